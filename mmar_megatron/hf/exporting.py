"""A checkpoint -> a directory that transformers loads: weights, code, tokenizer, image codec, settings, and a model card.

Weights pass through tensor by tensor, so that no more is in memory than one file of them and one tensor.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mmar_megatron import platform
from mmar_megatron.config import CodecConfig, Config, DataConfig, parse_command_line
from mmar_megatron.data.codec import ImageCodec, build_codec
from mmar_megatron.data.source import tokenizer_file
from mmar_megatron.data.tokenizer import SPECIAL_TOKENS, Tokenizer, find_tokenizer, load_tokenizer
from mmar_megatron.data.vae import CONFIG_NAME, VAECodec
from mmar_megatron.engine.sharding import AVERAGE_PREFIX
from mmar_megatron.hf.card import model_card
from mmar_megatron.hf.configuration_mmar import MMARConfig
from mmar_megatron.hf.modeling_mmar import MMARForCausalLM
from mmar_megatron.hf.names import Heads, Link, join, links, split
from mmar_megatron.hf.shipping import AUTO_MAP, shipped_code, stamped
from mmar_megatron.hf.storage import CheckpointReader, Pace, TensorSpec, all_or_nothing
from mmar_megatron.hf.tokenizer_json import hugging_face_files
from mmar_megatron.hf.weights import INDEX, SINGLE
from mmar_megatron.model.mmar_model import padded_vocab_size
from mmar_megatron.training import checkpoint
from mmar_megatron.training.checkpoint import CONFIG

VAE = "vae"


@dataclass(frozen=True, kw_only=True)
class Exportable:
    """A checkpoint, opened, as the Hugging Face model that it is."""

    path: Path
    config: Config
    tokenizer: Tokenizer
    tokenizer_file: Path
    codec: ImageCodec
    reader: CheckpointReader
    prefix: str
    """Of the names of its weights; `AVERAGE_PREFIX` where it is their average."""
    dtype: torch.dtype | None
    """None: each tensor's own."""
    hf_config: MMARConfig
    links: list[Link]

    @property
    def heads(self) -> Heads:
        """What the layout of queries, keys and values follows from."""
        return heads_of(self.hf_config)

    def tensors(self, link: Link) -> dict[str, Tensor]:
        """The Hugging Face tensors of a link.

        Raises:
            ValueError: `dtype` is too narrow for a value.
        """
        stored = self.reader.read(self.prefix + link.ours, link.layer)
        tensor = stored if self.dtype is None else stored.to(self.dtype)
        if tensor is not stored and bool((tensor.isinf() & stored.isfinite()).any()):
            raise ValueError(
                f"{link.theirs[0]} has the value {stored.abs().max():.4g}, which {tensor.dtype} cannot hold: take another --dtype"
            )
        return split(link, tensor, heads=self.heads)

    def nbytes(self, link: Link) -> int:
        """Size of these tensors."""
        spec = self.reader.tensors[self.prefix + link.ours]
        dtype = self.dtype or spec.dtype
        count = TensorSpec(spec.shape if link.layer is None else spec.shape[1:], dtype)
        return count.nbytes

    @property
    def total_bytes(self) -> int:
        """Size of all tensors."""
        return sum(self.nbytes(link) for link in self.links)


def open_checkpoint(
    path: str | Path,
    *,
    average: bool = False,
    dtype: torch.dtype | None = None,
    tokenizer: str | Path | None = None,
    vae: str | Path | None = None,
    say: Callable[[str], None] = print,
) -> Exportable:
    """Opens a checkpoint, and checks that all its weights have a place in the model that its configuration describes.

    Args:
        path: of a checkpoint, or of a run, whose newest it then is.
        average: take the moving average of the weights.
        dtype: to convert the weights to; none: as they are.
        tokenizer, vae: where these lie now, if it is not where the configuration says.
        say: is told of damaged checkpoints.

    Raises:
        ValueError: it is damaged, or of another model than its configuration says; tokenizer or codec are missing, or others than
            it was trained with.
    """
    path = checkpoint.resolve(path, say=say)
    config = parse_command_line(["--config", str(path / CONFIG)]).config
    file = _tokenizer_file(config.data, tokenizer)
    loaded = load_tokenizer(file)
    codec = _codec(config.data.codec, vae)
    checkpoint.check_fingerprints(path, {"tokenizer": loaded.fingerprint, "codec": codec.fingerprint})
    hf_config = hugging_face_config(config, tokenizer=loaded, codec=codec)
    reader = CheckpointReader(path)
    prefix = AVERAGE_PREFIX if average else ""
    there = {key.removeprefix(prefix): spec for key, spec in reader.tensors.items() if _is_of(key, prefix)}
    if not there:
        raise ValueError(f"The checkpoint {path} holds no average of the weights: export without --ema.")
    _check_tensors(path, there, hf_config)
    return Exportable(
        path=path,
        config=config,
        tokenizer=loaded,
        tokenizer_file=file,
        codec=codec,
        reader=reader,
        prefix=prefix,
        dtype=dtype,
        hf_config=hf_config,
        links=links(tensors_of(hf_config)),
    )


def _tokenizer_file(config: DataConfig, path: str | Path | None) -> Path:
    if path is not None:
        return find_tokenizer(path)
    try:
        return tokenizer_file(config)
    except (ValueError, OSError) as error:
        raise ValueError(f"{error}; if it lies elsewhere now, give --tokenizer") from error


def _codec(config: CodecConfig, path: str | Path | None) -> ImageCodec:
    if path is not None and config.kind != "vae":
        raise ValueError(f"The run's codec is {config.kind}, which has no auto-encoder: leave out --vae.")
    try:
        return build_codec(config if path is None else replace(config, path=str(path)))
    except ValueError as error:
        if path is not None:
            raise
        raise ValueError(f"{error}; if it lies elsewhere now, give --vae") from error


def hugging_face_config(config: Config, *, tokenizer: Tokenizer, codec: ImageCodec) -> MMARConfig:
    """A run's configuration -> the exported model's."""
    model, backbone = config.model, config.model.backbone
    rotary = {"base": model.rotary_base}
    if model.rotary_scaling.scaling != "none":
        rotary |= asdict(model.rotary_scaling)
    return MMARConfig(
        vocab_size=padded_vocab_size(model, tokenizer.vocab_size),
        hidden_size=backbone.hidden_size,
        intermediate_size=backbone.ffn_hidden_size,
        num_hidden_layers=backbone.num_layers,
        num_attention_heads=backbone.num_attention_heads,
        num_key_value_heads=backbone.num_query_groups,
        head_dim=backbone.kv_channels,
        rms_norm_eps=backbone.layernorm_epsilon,
        qkv_bias=backbone.add_qkv_bias,
        qk_norm=backbone.qk_layernorm,
        rotary=rotary,
        embedding_vit=asdict(model.embedding_vit),
        head=asdict(model.head),
        diffusion=asdict(model.diffusion),
        image={"grid_height": codec.grid_height, "grid_width": codec.grid_width, "channels": codec.channels},
        mask_ratio=asdict(config.data.mask_ratio),
        text_loss_weight=model.text_loss_weight,
        image_loss_weight=model.image_loss_weight,
        alignment_loss_weight=model.alignment_loss_weight,
        alignment_features=model.alignment_features if model.alignment_loss_weight > 0 else 0,
        initializer_range=backbone.init_method_std,
        max_position_embeddings=config.data.sequence_length,
        tie_word_embeddings=model.tie_embeddings,
        **{f"{role}_token_id": getattr(tokenizer, f"{role}_id") for role in SPECIAL_TOKENS},
    )


def heads_of(config: MMARConfig) -> Heads:
    """What the layout of queries, keys and values follows from."""
    return Heads(num_query_groups=config.num_key_value_heads, head_dim=config.head_dim)


def tensors_of(config: MMARConfig) -> dict[str, Tensor]:
    """Names and shapes of a Hugging Face model's tensors, on the meta device; of tied embeddings the word embeddings alone."""
    with torch.device("meta"):
        tensors = dict(MMARForCausalLM(config).state_dict())
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return tensors


def checkpoint_shapes(config: MMARConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of a checkpoint's tensors, by their names there: layers of the backbone are stacked along the first axis."""
    tensors, heads = tensors_of(config), heads_of(config)
    shapes: dict[str, tuple[int, ...]] = {}
    for link in links(tensors):
        shape = tuple(join(link, tensors, heads=heads).shape)
        shapes[link.ours] = shape if link.layer is None else (config.num_hidden_layers, *shape)
    return shapes


def _check_tensors(path: Path, there: Mapping[str, TensorSpec], config: MMARConfig) -> None:
    expected = checkpoint_shapes(config)
    for key, shape in expected.items():
        if key not in there:
            raise ValueError(f"The checkpoint {path} has no tensor {key}, which its {CONFIG} asks for.")
        if there[key].shape != shape:
            raise ValueError(f"The checkpoint {path} has {key} of shape {there[key].shape}, and its {CONFIG} asks for {shape}.")
    if extra := sorted(there.keys() - expected.keys()):
        raise ValueError(f"The checkpoint {path} has the tensor {extra[0]}, which has no place in the model of its {CONFIG}.")


def _is_of(key: str, prefix: str) -> bool:
    return key.startswith(prefix) if prefix else not key.startswith(AVERAGE_PREFIX)


# --- writing --------------------------------------------------------------------------------------------------------------------


def export(source: Exportable, out: Path, *, shard_bytes: int = 5 * 10**9, say: Callable[[str], None] = print) -> None:
    """Writes the directory `out`: all of it, or nothing.

    Args:
        source: the opened checkpoint.
        out: must not exist.
        shard_bytes: most that a file of weights has, but for a tensor that alone is larger.
        say: is told how far it is, every few seconds.

    Raises:
        ValueError: `out` exists; or a value does not fit into the source's `dtype`.
        OSError: the disk is too full or cannot be written.
    """
    needed = source.total_bytes + sum(file.stat().st_size for file in copies_of(source).values())
    with all_or_nothing(out, needed=needed) as partial:
        _write_weights(source, partial, shard_bytes=shard_bytes, say=say)
        for name, text in files_of(source).items():
            (partial / name).write_text(text)
        for name, file in copies_of(source).items():
            (partial / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, partial / name)


def files_of(source: Exportable) -> dict[str, str]:
    """All text files of an export: name -> content."""
    ids = {role: getattr(source.tokenizer, f"{role}_id") for role in SPECIAL_TOKENS}
    files = {**stamped(shipped_code()), **hugging_face_files(source.tokenizer, source.tokenizer_file.read_bytes())}
    files["config.json"] = config_json(source)
    files["generation_config.json"] = _as_json(_generation(source, ids))
    files["processor_config.json"] = _as_json(
        {
            "auto_map": {"AutoProcessor": AUTO_MAP["AutoProcessor"]},
            "processor_class": "MMARProcessor",
            "codec": codec_settings(source.codec),
            "special_tokens": ids,
            "mask_ratio": source.hf_config.mask_ratio,
        }
    )
    tokenizer_config = json.loads(files["tokenizer_config.json"])
    files["tokenizer_config.json"] = _as_json({**tokenizer_config, "processor_class": "MMARProcessor"})
    files["README.md"] = model_card(source.path, source.config, average=bool(source.prefix))
    return files


def copies_of(source: Exportable) -> dict[str, Path]:
    """All that an export has as it is: name -> where it lies now."""
    if not isinstance(source.codec, VAECodec):
        return {}
    return {f"{VAE}/{file.name}": file for file in (source.codec.path / CONFIG_NAME, source.codec.weights)}


def codec_settings(codec: ImageCodec) -> dict[str, Any]:
    """What the exported processor must know of the codec."""
    settings: dict[str, Any] = {
        name: getattr(codec, name) for name in ("image_size", "patch_size", "grid_height", "grid_width", "channels")
    }
    if not isinstance(codec, VAECodec):
        return {"kind": "patch", **settings}
    return {"kind": "vae", **settings, "shift": codec.shift.tolist(), "scale": codec.scale.tolist()}


def config_json(source: Exportable) -> str:
    """`config.json` of an export."""
    tensors = source.reader.tensors
    dtype = source.dtype or tensors[f"{source.prefix}embedding.word_embeddings.weight"].dtype
    settings = {
        "architectures": ["MMARForCausalLM"],
        "auto_map": AUTO_MAP,
        "dtype": str(dtype).removeprefix("torch."),
        "mmar_megatron_version": platform.versions()["mmar_megatron"],
    }
    return _as_json({**source.hf_config.to_diff_dict(), **settings})


def _generation(source: Exportable, ids: Mapping[str, int]) -> dict[str, Any]:
    """Text must not hold what only pads the vocabulary, nor parts of an image."""
    never = {ids["pad"], ids["bos"], ids["begin_image"], ids["end_image"], ids["image"]} - {ids["eos"]}
    padding = range(source.tokenizer.vocab_size, source.hf_config.vocab_size)
    return {
        **{f"{role}_token_id": ids[role] for role in ("bos", "eos", "pad")},
        "suppress_tokens": sorted({*never, *padding}),
        "max_new_tokens": 64,
    }


def _as_json(values: Any) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def _write_weights(source: Exportable, directory: Path, *, shard_bytes: int, say: Callable[[str], None]) -> None:
    shards = list(_in_shards(source, shard_bytes))
    pace = Pace(pieces=len(source.links), nbytes=source.total_bytes, say=say)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors: dict[str, Tensor] = {}
        for link in shard:
            tensors |= source.tensors(link)
            pace.done(source.nbytes(link))
        save_file(tensors, directory / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": source.total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (directory / INDEX).write_text(_as_json(index))
    readable = directory.stat().st_mode & 0o666  # safetensors' files are the owner's alone
    for file in directory.iterdir():
        file.chmod(readable)


def _in_shards(source: Exportable, shard_bytes: int) -> Iterator[list[Link]]:
    shard: list[Link] = []
    size = 0
    for link in source.links:
        more = source.nbytes(link)
        if shard and size + more > shard_bytes:
            yield shard
            shard, size = [], 0
        shard.append(link)
        size += more
    yield shard
