"""Auto-encoders in the names of latent diffusion's original code -> `diffusers.AutoencoderKL`.

So come MAR's KL-16, FLUX's `ae.safetensors` and the first stage of Stable Diffusion checkpoints. The checkpoint has no config:
the sizes are read from the shapes of its weights. diffusers' own converter knows no attention within a level, which KL-16 has.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from mmar_megatron.data.vae import new_autoencoder, save_autoencoder
from mmar_megatron.data.weights import check_whole

_NORM_GROUPS = 32
"""Of all networks of that code."""
_PREFIXES = ("first_stage_model.", "vae.", "")
_PARTS = re.compile(r"(encoder|decoder|quant_conv|post_quant_conv)\.")
_RENAMED = (
    (r"^encoder\.down\.(\d+)\.block\.", r"encoder.down_blocks.\1.resnets."),
    (r"^encoder\.down\.(\d+)\.attn\.", r"encoder.down_blocks.\1.attentions."),
    (r"^encoder\.down\.(\d+)\.downsample\.", r"encoder.down_blocks.\1.downsamplers.0."),
    (r"^decoder\.up\.(\d+)\.block\.", r"decoder.up_blocks.\1.resnets."),
    (r"^decoder\.up\.(\d+)\.attn\.", r"decoder.up_blocks.\1.attentions."),
    (r"^decoder\.up\.(\d+)\.upsample\.", r"decoder.up_blocks.\1.upsamplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.norm_out\.", ".conv_norm_out."),
    (r"(\.attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(\.attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
    (r"(\.attentions\.\d+)\.norm\.", r"\1.group_norm."),
)


def convert(checkpoint: Path, out: Path, *, scaling_factor: float, shift_factor: float = 0.0) -> Any:
    """Writes the directory `out` that `VAECodec` reads, and returns the `AutoencoderKL`.

    Args:
        checkpoint: `.safetensors`, or what `torch.save` wrote.
        out: must not exist.
        scaling_factor, shift_factor: of the latents; they are not in the checkpoint.

    Raises:
        ValueError: `out` exists; the checkpoint is not such an auto-encoder.
    """
    if out.exists():
        raise ValueError(f"{out} exists: remove it or choose another --out")
    weights = read_checkpoint(checkpoint)
    try:
        model = new_autoencoder(**config_of(weights))
        model.load_state_dict(diffusers_names(weights))
    except (KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{checkpoint} is no auto-encoder of latent diffusion ({reason}): give another checkpoint") from error
    unfinished = out.with_name(f".{out.name}.unfinished")
    save_autoencoder(model, unfinished, scaling_factor=scaling_factor, shift_factor=shift_factor)
    unfinished.rename(out)
    return model


def read_checkpoint(file: Path) -> dict[str, Tensor]:
    """The auto-encoder's weights by LDM's names, without the prefix that a larger model gives them.

    Raises:
        ValueError: the file is missing, damaged, or holds something else.
    """
    if not file.is_file():
        raise ValueError(f"there is no file {file}: give a checkpoint")
    check_whole(file)
    if file.suffix == ".safetensors":
        content: Any = load_file(file)
    else:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a pickle can hold
            raise ValueError(f"{file} holds more than weights, which could run as a program: save its weights alone") from error
        for key in ("state_dict", "model"):
            content = content.get(key, content)
    for prefix in _PREFIXES:
        weights = {name.removeprefix(prefix): w for name, w in content.items() if _PARTS.match(name.removeprefix(prefix))}
        if weights and all(prefix + name in content for name in weights):
            return {name: weight.float() for name, weight in weights.items()}
    raise ValueError(f"{file} has no weights named encoder and decoder: give the checkpoint of an auto-encoder")


def config_of(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of `AutoencoderKL` that follow from the weights, by LDM's names.

    Raises:
        KeyError: a weight that is always there is not.
        ValueError: latents of another number of channels than the encoder's, which diffusers does not know.
    """
    levels = range(1 + max(int(name.split(".")[2]) for name in weights if name.startswith("encoder.down.")))
    latent_channels = weights["decoder.conv_in.weight"].shape[1]
    quant_conv = weights.get("quant_conv.weight")
    if quant_conv is not None and quant_conv.shape[:2] != (2 * latent_channels, 2 * latent_channels):
        raise ValueError(
            f"embed_dim is not z_channels ({list(quant_conv.shape)}), which diffusers does not know: take another one"
        )

    def attends(side: str, level: int) -> bool:
        return any(name.startswith(f"{side}.{level}.attn.") for name in weights)

    return {
        "block_out_channels": tuple(weights[f"encoder.down.{level}.block.0.conv1.weight"].shape[0] for level in levels),
        "down_block_types": tuple("Attn" * attends("encoder.down", level) + "DownEncoderBlock2D" for level in levels),
        "up_block_types": tuple("Attn" * attends("decoder.up", level) + "UpDecoderBlock2D" for level in reversed(levels)),
        "layers_per_block": sum(bool(re.fullmatch(r"encoder\.down\.0\.block\.\d+\.conv1\.weight", name)) for name in weights),
        "latent_channels": latent_channels,
        "norm_num_groups": _NORM_GROUPS,
        "use_quant_conv": quant_conv is not None,
        "use_post_quant_conv": "post_quant_conv.weight" in weights,
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in weights,
    }


def diffusers_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """LDM's names -> those of `AutoencoderKL`; the 1 x 1 convolutions of attention become matrices."""
    last = max(int(name.split(".")[2]) for name in weights if name.startswith("decoder.up."))
    renamed = {}
    for name, weight in weights.items():
        # LDM counts the decoder's levels from the finest, diffusers in the order of computation.
        name = re.sub(r"^decoder\.up\.(\d+)\.", lambda match: f"decoder.up.{last - int(match[1])}.", name)
        for pattern, replacement in _RENAMED:
            name = re.sub(pattern, replacement, name)
        is_matrix = ".attentions." in name and weight.ndim == 4
        renamed[name] = weight[:, :, 0, 0] if is_matrix else weight
    return renamed
