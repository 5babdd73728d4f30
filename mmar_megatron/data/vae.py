"""Images as latents of a variational auto-encoder: `diffusers.AutoencoderKL` from a directory, in any of its layouts.

The directory is diffusers' own: `config.json` and `diffusion_pytorch_model.safetensors` (or `.bin`). Its config has the geometry,
the scale and the shift, its weights are read when something is encoded or decoded, and not before: a run on cached moments is up
without them. Checkpoints of latent diffusion's original code (MAR's KL-16, FLUX's `ae.safetensors`) are brought into this form by
`tools/convert_vae.py`.

A token is a patch of P x P latent positions, scaled: token = (latent - shift) * scale. So is what is stored of a picture, its
moments: the mean and the log-variance of its tokens. `sample_tokens` draws from them, afresh in each epoch.

Axes: B pictures, H, W pixels, N tokens of an image in raster order, C = latent channels * P * P, 2 mean and log-variance; "..."
any leading axes.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray

from mmar_megatron import platform
from mmar_megatron.data.patches import pixels_of
from mmar_megatron.data.weights import check_whole, weights_hash

CONFIG_NAME = "config.json"
WEIGHTS_NAMES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
"""The first that is there is used, as in diffusers."""
_PIXELS_AT_A_TIME = 2**19
"""Through the network in one call, which bounds its memory: 8 pictures of 256 x 256."""
_FLOAT16_MOST = float(np.finfo(np.float16).max)


class VAECodec:
    """The latents of a `diffusers.AutoencoderKL`, `patch_size` x `patch_size` of them to a token.

    Args:
        path: its directory.
        image_size: pixels along each side of the image.
        patch_size: latent positions along each side of a token's patch.

    Attributes:
        downscale: pixels for each latent position, along each side.

    Raises:
        ValueError: no such auto-encoder is there, its weights are missing or cut off, or the image does not divide into tokens.
    """

    def __init__(self, path: str | Path, *, image_size: int, patch_size: int = 1) -> None:
        self.path = Path(path)
        self.config = read_config(self.path)
        self.weights = find_weights(self.path)
        self.downscale = 2 ** (len(self.config["block_out_channels"]) - 1)
        if image_size % (self.downscale * patch_size):
            raise ValueError(
                f"image_size {image_size} is not a multiple of {self.downscale * patch_size}, the pixels of a token of {path} "
                f"({self.downscale} for a latent x patch_size {patch_size}): change one of them"
            )
        self.image_size = image_size
        self.patch_size = patch_size
        self.grid_height = self.grid_width = image_size // (self.downscale * patch_size)
        self.num_tokens = self.grid_height * self.grid_width
        self.latent_channels: int = self.config["latent_channels"]
        self.channels = self.latent_channels * patch_size**2
        self.shift, self.scale = _shift_and_scale(self.config)
        self._model: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": None}  # a loader's worker loads its own, if it needs one

    @cached_property
    def fingerprint(self) -> str:
        """Of everything that decides what a token means; see `weights_hash` for what is read of large weights."""
        return f"vae, {weights_hash(self.config, [self.weights])}, image_size {self.image_size}, patch_size {self.patch_size}"

    def encode(self, image_HW3: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Pixels uint8 [..., H, W, 3] -> tokens float32 [..., N, C]: the means."""
        leading = image_HW3.shape[:-3]
        moments_B2NC = self.moments(image_HW3.reshape(-1, *image_HW3.shape[-3:]))
        return moments_B2NC[:, 0].reshape(*leading, self.num_tokens, self.channels)

    def moments(self, pixels_BHW3: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Pixels uint8 [B, H, W, 3] -> mean and log-variance of the tokens, float32 [B, 2, N, C]."""
        chunks = [self._moments(chunk_BHW3) for chunk_BHW3 in self._chunks(pixels_BHW3)]
        return np.concatenate(chunks) if chunks else np.empty((0, 2, self.num_tokens, self.channels), np.float32)

    def decode(self, tokens_NC: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Tokens [..., N, C] -> pixels uint8 [..., H, W, 3]; values outside [-1, 1] are clipped."""
        leading = tokens_NC.shape[:-2]
        tokens_BNC = tokens_NC.reshape(-1, *tokens_NC.shape[-2:])
        chunks = [self._decode(chunk_BNC) for chunk_BNC in self._chunks(tokens_BNC)]
        side = self.image_size
        pixels_BHW3 = np.concatenate(chunks) if chunks else np.empty((0, side, side, 3), np.uint8)
        return pixels_BHW3.reshape(*leading, side, side, 3)

    def _chunks(self, rows: NDArray[Any]) -> list[NDArray[Any]]:
        size = max(1, _PIXELS_AT_A_TIME // self.image_size**2)
        return [rows[begin : begin + size] for begin in range(0, len(rows), size)]

    @torch.no_grad()
    def _moments(self, pixels_BHW3: NDArray[np.uint8]) -> NDArray[np.float32]:
        if pixels_BHW3.shape[1:] != (self.image_size, self.image_size, 3):
            raise ValueError(f"a picture is {pixels_BHW3.shape[1:]}, this codec's are {self.image_size} pixels along each side")
        model = self._loaded()
        pixels = torch.tensor(np.ascontiguousarray(pixels_BHW3), device=platform.device(), dtype=torch.float32)
        latents = model.encode(rearrange(pixels, "b h w c -> b c h w") / 127.5 - 1).latent_dist
        shift, scale = self._on_device(self.shift), self._on_device(self.scale)
        # diffusers has clipped the log-variance to [-30, 20].
        of_tokens = (latents.mean - shift) * scale, latents.logvar + 2 * scale.abs().log()
        return torch.stack([self._to_tokens(moment) for moment in of_tokens], dim=1).cpu().numpy()

    @torch.no_grad()
    def _decode(self, tokens_BNC: NDArray[np.float32]) -> NDArray[np.uint8]:
        model = self._loaded()
        latents = self._to_latents(torch.tensor(tokens_BNC, device=platform.device(), dtype=torch.float32))
        # One memory layout whatever the patch size: convolutions round differently in another.
        latents = latents.contiguous() / self._on_device(self.scale) + self._on_device(self.shift)
        pixels = rearrange(model.decode(latents).sample, "b c h w -> b h w c").cpu().numpy()
        return pixels_of(pixels)

    def _to_tokens(self, latents: torch.Tensor) -> torch.Tensor:
        ph = pw = self.patch_size
        return rearrange(latents, "b c (gh ph) (gw pw) -> b (gh gw) (ph pw c)", ph=ph, pw=pw)

    def _to_latents(self, tokens_BNC: torch.Tensor) -> torch.Tensor:
        sizes = {"gh": self.grid_height, "ph": self.patch_size, "pw": self.patch_size}
        return rearrange(tokens_BNC, "b (gh gw) (ph pw c) -> b c (gh ph) (gw pw)", **sizes)

    def _on_device(self, per_channel: NDArray[np.float32]) -> torch.Tensor:
        return rearrange(torch.tensor(per_channel, device=platform.device()), "c -> 1 c 1 1")

    def _loaded(self) -> Any:
        if self._model is None:
            self._model = load_autoencoder(self.path).to(platform.device()).eval().requires_grad_(False)
        return self._model


class MomentsEncoder:
    """What preparation stores of pictures for a VAE: `moments`, and with `flip` also `flipped`, those of the mirrored picture."""

    def __init__(self, codec: VAECodec, *, flip: bool) -> None:
        self._codec = codec
        self._flip = flip

    @property
    def fingerprint(self) -> str:
        """The codec's."""
        return self._codec.fingerprint

    def __call__(self, pixels_BHW3: NDArray[np.uint8]) -> dict[str, NDArray[np.float16]]:
        """Pixels uint8 [B, H, W, 3] -> {"moments": float16 [B, 2, N, C], "flipped": the same}."""
        stored = {"moments": _to_float16(self._codec.moments(pixels_BHW3))}
        if self._flip:
            stored["flipped"] = _to_float16(self._codec.moments(pixels_BHW3[:, :, ::-1]))
        return stored


def sample_tokens(moments_2NC: NDArray[np.floating], generator: np.random.Generator) -> NDArray[np.float32]:
    """Moments [2, N, C] of any floating type -> tokens float32 [N, C]: mean + exp(logvar / 2) * eps, in fp32."""
    mean_NC, logvar_NC = moments_2NC.astype(np.float32)
    eps_NC = generator.standard_normal(mean_NC.shape, dtype=np.float32)
    return mean_NC + np.exp(logvar_NC / 2) * eps_NC


def _to_float16(moments: NDArray[np.float32]) -> NDArray[np.float16]:
    return moments.clip(-_FLOAT16_MOST, _FLOAT16_MOST).astype(np.float16)  # an infinite mean would poison the whole step


def read_config(path: Path) -> dict[str, Any]:
    """The config of an `AutoencoderKL` for RGB pictures.

    Raises:
        ValueError: there is no directory, no config, or one of something else.
    """
    advice = "give the directory of a diffusers AutoencoderKL (of Stable Diffusion, the one named vae)"
    if path.is_file():
        command = f"python tools/convert_vae.py {path} --out DIR --scaling_factor SCALE"
        raise ValueError(f"{path} is a file: convert it with `{command}`, and give that directory")
    if not path.is_dir():
        raise ValueError(f"there is no directory {path}: {advice}")
    file = path / CONFIG_NAME
    if not file.is_file():
        raise ValueError(f"{path} has no {CONFIG_NAME}: {advice}")
    try:
        config = json.loads(file.read_text())
        name = config.get("_class_name")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file} is not a JSON object: copy it again") from error
    if name != "AutoencoderKL":
        raise ValueError(f"{file} is of {name or 'no class'}, not of an AutoencoderKL: {advice}")
    for key in ("block_out_channels", "latent_channels"):
        if key not in config:
            raise ValueError(f"{file} has no {key}, which the size of the tokens follows from: copy it again")
    if (config.get("in_channels", 3), config.get("out_channels", 3)) != (3, 3):
        raise ValueError(f"{file} is not for pictures of 3 channels: {advice}")
    return config


def _shift_and_scale(config: dict[str, Any]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Both [latent channels]: (latent - shift) * scale is what a diffusion model reads.

    A single factor in SD's and FLUX's layouts; `latents_mean` and `latents_std`, where there are any, have one for each channel.
    """
    channels = config["latent_channels"]
    shift, scale = config.get("shift_factor"), config.get("scaling_factor")
    mean, std = config.get("latents_mean"), config.get("latents_std")
    shift_C = np.broadcast_to(np.float32(0 if shift is None else shift), channels)
    scale_C = np.broadcast_to(np.float32(0.18215 if scale is None else scale), channels)  # diffusers' default, SD's
    if mean is not None and std is not None:
        shift_C = np.array(mean, np.float32).reshape(channels)
        scale_C = (scale_C / np.array(std, np.float32).reshape(channels)).astype(np.float32)
    return shift_C.copy(), scale_C.copy()


def find_weights(path: Path) -> Path:
    """The file with the weights.

    Raises:
        ValueError: there is none, or it is shorter than it says itself.
    """
    file = next((path / name for name in WEIGHTS_NAMES if (path / name).is_file()), None)
    if file is None:
        raise ValueError(f"{path} has no {WEIGHTS_NAMES[0]}: copy the weights there too")
    check_whole(file)
    return file


def load_autoencoder(path: Path) -> Any:
    """The `diffusers.AutoencoderKL` of a directory, in fp32 on the CPU.

    Raises:
        ValueError: the weights are not those of the config.
    """
    from diffusers import AutoencoderKL  # takes seconds

    find_weights(path)
    with torch.random.fork_rng(devices=[]):  # it fills its layers at random before it reads the weights
        try:
            model, report = AutoencoderKL.from_pretrained(
                path,
                torch_dtype=torch.float32,
                local_files_only=True,
                low_cpu_mem_usage=False,  # would need accelerate
                output_loading_info=True,
            )
        except (OSError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"the weights in {path} cannot be loaded ({reason}): copy the directory again") from error
    # diffusers only warns of these, and leaves them at random.
    if wrong := [*report["missing_keys"], *report["mismatched_keys"]]:
        raise ValueError(f"{path} lacks {len(wrong)} weights that its config asks for, such as {wrong[0]}: copy it again")
    return model


def new_autoencoder(**config: Any) -> Any:
    """A `diffusers.AutoencoderKL` with the random weights of torch's global generator."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(**config)


def save_autoencoder(model: Any, path: Path, *, scaling_factor: float, shift_factor: float) -> None:
    """Writes the directory that `VAECodec` reads."""
    model.register_to_config(scaling_factor=scaling_factor, shift_factor=shift_factor)
    model.save_pretrained(path, safe_serialization=True)
