"""A pretrained Hugging Face model -> a checkpoint that `checkpoint.init_from` loads, in any layout.

The backbone and the word embeddings of a language model come from its files, bit for bit and in their type. The image parts are
drawn as a run with the same seed would draw them. Our own exports (`model_type: mmar`) come from their files whole. All is
checked before anything is written, and no more is in memory than the largest tensor and the image parts.
"""

from __future__ import annotations

import copy
import secrets
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor

from mmar_megatron import parallel
from mmar_megatron.config import CommandLine, Config, ParallelConfig, parse_command_line
from mmar_megatron.config_checks import OTHER_SPLITS
from mmar_megatron.data.codec import build_codec
from mmar_megatron.data.tokenizer import SPECIAL_TOKENS, TOKENIZER_NAMES, Tokenizer, load_tokenizer
from mmar_megatron.hf.configuration_mmar import MMARConfig
from mmar_megatron.hf.exporting import checkpoint_shapes, heads_of, hugging_face_config, tensors_of
from mmar_megatron.hf.families import MMAR, Pretrained, contradictions, model_section, read_pretrained
from mmar_megatron.hf.names import Link, join, links, split
from mmar_megatron.hf.storage import TensorSpec, write_checkpoint
from mmar_megatron.hf.weights import HuggingFaceWeights
from mmar_megatron.model.image_geometry import ImageGeometry
from mmar_megatron.model.mmar_model import build_model, padded_vocab_size
from mmar_megatron.training.checkpoint import IMPORTED_FROM, WEIGHTS_ONLY, Progress
from mmar_megatron.training.saving import facts_of

_WORDS, _OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
_OF_LANGUAGE_MODELS = ("decoder.", _WORDS, _OUTPUT)
_TIED_OUTPUT, _THEIR_WORDS = "lm_head.weight", "model.embed_tokens.weight"
_ROWS_AT_ONCE = 4096
_SMALL = {
    "num_layers": 1,
    "ffn_hidden_size": 2,
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "sequence_parallel": False,
    "params_dtype": torch.float32,
    "use_cpu_initialization": True,
    "perform_initialization": False,
    **dict.fromkeys(OTHER_SPLITS),
}
"""Fields of the backbone beside which image parts are drawn, whatever the run's sizes, layout and precision."""


@dataclass(frozen=True, kw_only=True)
class ImportReport:
    """What came from where."""

    loaded: int
    """Tensors of the files."""
    fresh: int
    """Tensors that were drawn."""
    seed: int
    dtypes: tuple[str, ...]
    """Of those from the files."""
    found: dict[str, tuple[str, int]]
    """Special tokens that the tokenizer has: name and id, by role."""
    appended: dict[str, int]
    """Ids of those it lacks, by role."""
    copied_rows: int
    dropped_rows: int
    """Rows of the embeddings beyond the tokenizer's vocabulary."""
    rows: int
    """Of the embeddings in the checkpoint."""
    sliding_window: int | None

    def __str__(self) -> str:
        lines = [f"{self.loaded} tensors taken over ({', '.join(self.dtypes)})"]
        if self.fresh:
            lines[0] += f", {self.fresh} of the image parts drawn with seed {self.seed}"
        found = ", ".join(f"{role} {name} = {token_id}" for role, (name, token_id) in self.found.items())
        lines.append(f"special tokens in the vocabulary: {found or 'none'}")
        if self.appended:
            appended = ", ".join(f"{role} = {token_id}" for role, token_id in self.appended.items())
            lines.append(f"special tokens appended, which begin as the mean of all words: {appended}")
        lines.append(f"vocabulary: {self.rows} rows")
        if self.copied_rows < self.rows:
            padding = self.rows - self.copied_rows - len(self.appended)
            lines[-1] += f", of which {self.copied_rows} copied and {padding} that only pad"
        if self.dropped_rows:
            lines[-1] += f"; {self.dropped_rows} that no token had were left out"
        if self.sliding_window is not None:
            lines.append(f"sliding window: {self.sliding_window} positions, which no sequence exceeds: attention is whole here")
        return "\n".join(lines)


def import_model(
    hf: Path,
    out: Path,
    *,
    configs: Sequence[str],
    options: Sequence[str] = (),
    write_config: Path | None = None,
    say: Callable[[str], object] = print,
) -> ImportReport:
    """Convert a Hugging Face model.

    Args:
        hf: its directory.
        out: directory of the checkpoint, which must not exist.
        configs: YAML files of the run that will start from it; later ones win.
        options: of its command line: `--section.key VALUE`; these win over files.
        write_config: YAML file to make, with the section `model` and the tokenizer that belong to `hf`; wins over `configs`.
        say: is told how far it is.

    Raises:
        ValueError: the model cannot be built here, its files are not whole, or the configuration is of another model.
        OSError: reading or writing fails.
    """
    for made, option in ((out, "--out"), (write_config, "--write-config")):
        if made is not None and made.exists():
            raise ValueError(f"{made} exists: remove it or choose another {option}")
    if write_config is not None and write_config.absolute() == out.absolute():
        raise ValueError(f"--out and --write-config are both {out}: choose another --write-config")
    pretrained = read_pretrained(hf)
    weights = HuggingFaceWeights(hf)
    written = _section_for(pretrained, tokenizer=str(hf.resolve())) if write_config else None
    command = _parse(configs, options, section=written, tokenizer=hf)
    config = command.config
    _check_configuration(config, pretrained, hf=hf)
    codec = build_codec(config.data.codec)
    geometry = ImageGeometry.of(codec)
    _check_geometry(geometry, pretrained, hf=hf)
    tokenizer = _tokenizer_of(config, hf=hf)
    rows = padded_vocab_size(config.model, tokenizer.vocab_size)
    _check_vocabulary(tokenizer, pretrained, hf=hf, rows=rows)

    hf_config = hugging_face_config(config, tokenizer=tokenizer, codec=codec)
    shapes = checkpoint_shapes(hf_config)
    is_mmar = pretrained.family == MMAR
    from_files = {key: shape for key, shape in shapes.items() if is_mmar or key.startswith(_OF_LANGUAGE_MODELS)}
    source = _Source(hf, weights, from_files, config=hf_config, pretrained=pretrained, copied_rows=tokenizer.base_vocab_size)
    fresh = {} if is_mmar else draw_image_parts(config, geometry=geometry)
    specs = {key: source.specs.get(key) or TensorSpec(shape, torch.float32) for key, shape in shapes.items()}
    write_checkpoint(
        out,
        specs,
        lambda key, layer: source.read(key, layer) if key in source.specs else fresh[key],
        config_yaml=command.yaml,
        facts=_facts(command, hf, tokenizer=tokenizer.fingerprint, codec=codec.fingerprint),
        say=say,
    )
    if write_config is not None:
        section = _section_for(pretrained, tokenizer=config.data.tokenizer)  # an option may have asked for another one
        _write_whole(write_config, f"# What {hf}/config.json makes of the model; goes on top of other configurations.\n{section}")
    return ImportReport(
        loaded=source.count,
        fresh=len(fresh),
        seed=config.seed,
        dtypes=tuple(sorted({str(spec.dtype).removeprefix("torch.") for spec in source.specs.values()})),
        found={role: (name, getattr(tokenizer, f"{role}_id")) for role, name in tokenizer.special_names.items()},
        appended={role: getattr(tokenizer, f"{role}_id") for role in SPECIAL_TOKENS if role not in tokenizer.special_names},
        copied_rows=rows if is_mmar else tokenizer.base_vocab_size,
        dropped_rows=0 if is_mmar else pretrained.vocab_size - tokenizer.base_vocab_size,
        rows=rows,
        sliding_window=pretrained.sliding_window,
    )


def draw_image_parts(config: Config, *, geometry: ImageGeometry) -> dict[str, Tensor]:
    """The initial weights of all but the backbone and the words, fp32, by their names in checkpoints.

    A run with this configuration begins with these, for they follow from the seed and not from the sizes of the rest.
    """
    backbone = copy.copy(config.model.backbone)
    for name, value in _SMALL.items():
        setattr(backbone, name, value)
    groups = parallel.initialize_fake(ParallelConfig(), rank=0, world_size=1)
    try:
        (model,) = build_model(
            replace(config.model, backbone=backbone),
            geometry=geometry,
            vocab_size=1,
            groups=groups,
            seed=config.seed,
            draw_weights=False,
        )
        state = model.sharded_state_dict(prefix="")
    finally:
        parallel.leave()
    drawn = {shard.key: shard.data.detach() for shard in state.values() if isinstance(shard, ShardedTensor)}
    return {key: tensor for key, tensor in drawn.items() if not key.startswith(_OF_LANGUAGE_MODELS)}


# --- the configuration ----------------------------------------------------------------------------------------------------------


def _section_for(pretrained: Pretrained, *, tokenizer: str | None) -> str:
    values = {"model": model_section(pretrained), "data": {"tokenizer": tokenizer}}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _parse(configs: Sequence[str], options: Sequence[str], *, section: str | None, tokenizer: Path) -> CommandLine:
    """The run's configuration, with a tokenizer in any case, so that the checkpoint says which one it is for."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(section or "")
        file.flush()
        files = [*configs, file.name] if section else configs
        arguments = [argument for config in files for argument in ("--config", config)] + [*options]
        try:
            command = parse_command_line(arguments)
        except ValueError as error:
            hint = "" if section else " --write-config FILE writes what the model must be."
            raise ValueError(f"{error}{hint}") from error
        if command.config.data.tokenizer is None:
            command = parse_command_line([*arguments, "--data.tokenizer", str(tokenizer)])
    return command


def _check_configuration(config: Config, pretrained: Pretrained, *, hf: Path) -> None:
    """Raises ValueError where it is of another model than the files."""
    for option, ours, theirs in contradictions(config.model, pretrained):
        raise ValueError(
            f"The configuration says {option} {ours}, but {hf}/config.json makes it {theirs}: change it, or let --write-config "
            "write what it must be."
        )
    window, length = pretrained.sliding_window, config.data.sequence_length
    if window is not None and window < length:
        raise ValueError(
            f"{hf}/config.json: attention reaches back over sliding_window {window} positions, and ours over all of a sequence: "
            f"lower data.sequence_length {length} to {window}."
        )


def _check_geometry(geometry: ImageGeometry, pretrained: Pretrained, *, hf: Path) -> None:
    ours = (geometry.grid_height, geometry.grid_width, geometry.channels)
    theirs = tuple(pretrained.image.get(name) for name in ("grid_height", "grid_width", "channels"))
    if pretrained.image and ours != theirs:
        raise ValueError(
            "With data.codec an image is {} x {} tokens of {} numbers, ".format(*ours)
            + "but {}/config.json says {} x {} of {}: change data.codec.".format(hf, *theirs)
        )


def _tokenizer_of(config: Config, *, hf: Path) -> Tokenizer:
    """The one that is configured. Raises ValueError where it is another than the model was trained with."""
    assert config.data.tokenizer is not None
    tokenizer = load_tokenizer(config.data.tokenizer)
    theirs = load_tokenizer(hf) if any((hf / name).is_file() for name in TOKENIZER_NAMES) else tokenizer
    for token_id in range(min(tokenizer.base_vocab_size, theirs.base_vocab_size)):
        if (ours := tokenizer.name_of(token_id)) != (own := theirs.name_of(token_id)):
            raise ValueError(
                f"data.tokenizer {config.data.tokenizer} is not that of {hf}: token {token_id} is {ours!r} in the former and "
                f"{own!r} in the latter: give {hf}, and prepare the data with it."
            )
    return tokenizer


def _check_vocabulary(tokenizer: Tokenizer, pretrained: Pretrained, *, hf: Path, rows: int) -> None:
    """Raises ValueError where the rows of the embeddings cannot be the tokenizer's ids."""
    if pretrained.family != MMAR:
        if pretrained.vocab_size < tokenizer.base_vocab_size:
            raise ValueError(
                f"{hf} has embeddings for {pretrained.vocab_size} tokens, but the tokenizer has {tokenizer.base_vocab_size}: "
                "give the tokenizer of this model as data.tokenizer."
            )
        return
    if pretrained.vocab_size != rows:
        raise ValueError(
            f"{hf} has embeddings for {pretrained.vocab_size} tokens, but the vocabulary of {tokenizer.vocab_size} is padded to "
            f"{rows}: give its tokenizer as data.tokenizer, and its model.make_vocab_size_divisible_by."
        )
    for role, token_id in pretrained.special_ids.items():
        if (ours := getattr(tokenizer, f"{role}_id")) != token_id:
            raise ValueError(
                f"{hf}/config.json: {role}_token_id is {token_id}, but {ours} in the tokenizer: give its own as data.tokenizer."
            )


def _facts(command: CommandLine, hf: Path, **fingerprints: str) -> dict[str, Any]:
    layout = {"tensor": 1, "pipeline": 1, "data": 1}
    progress = Progress(fingerprints=fingerprints)
    facts = facts_of(progress, engine="native", layout=layout, average=False, config_yaml=command.yaml)
    return {**facts, WEIGHTS_ONLY: True, IMPORTED_FROM: hf.resolve().name}


def _write_whole(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.write_text(text)
        partial.rename(file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


# --- from the files -------------------------------------------------------------------------------------------------------------


class _Source:
    """The checkpoint's tensors as they come from the files. All of it is checked here, from their headers.

    Args:
        hf: the directory.
        weights: what is in it.
        shapes: of the checkpoint's tensors that are to come from there.
        config: of the model that is made.
        pretrained: what the model is.
        copied_rows: ids of the tokenizer, without those that are appended.

    Raises:
        ValueError: a tensor is missing, of no use, or of another shape or type than it must be.
    """

    def __init__(
        self,
        hf: Path,
        weights: HuggingFaceWeights,
        shapes: Mapping[str, tuple[int, ...]],
        *,
        config: MMARConfig,
        pretrained: Pretrained,
        copied_rows: int,
    ) -> None:
        self._hf, self._weights, self._shapes, self._copied_rows = hf, weights, shapes, copied_rows
        self._pretrained = pretrained
        self._heads = heads_of(config)
        self._links = {(link.ours, link.layer): link for link in links(tensors_of(config)) if link.ours in shapes}
        self.count = sum(len(link.theirs) for link in self._links.values())
        self._check_names_and_shapes()
        self.specs = {key: TensorSpec(shape, self._dtype_of(key)) for key, shape in shapes.items()}

    def read(self, key: str, layer: int | None) -> Tensor:
        """One tensor of the checkpoint, of one layer where they are stacked."""
        link = self._links[key, layer]
        tensors = {name: self._weights.read(name) for name in link.theirs}
        for name, part in tensors.items():
            if not bool(part.isfinite().all()):
                raise ValueError(f"{self._hf}: {name} has values that are not finite: give a model that was saved whole.")
        tensor = join(link, tensors, heads=self._heads)
        if self._pretrained.family != MMAR and key in (_WORDS, _OUTPUT):
            return _with_mean_rows(tensor, copied=self._copied_rows, rows=self._shapes[key][0])
        return tensor

    def _check_names_and_shapes(self) -> None:
        expected = {
            name: shape for place, link in self._links.items() for name, shape in self._their_shapes(*place, link).items()
        }
        there = self._weights.specs
        for name, shape in expected.items():
            if name not in there:
                bare = name.removeprefix("model.")
                fix = "save it as a model for causal language modelling" if bare in there else "copy all of its files"
                raise ValueError(f"{self._hf} lacks the tensor {name}, which must be {list(shape)}: {fix}.")
            if there[name].shape != shape:
                raise ValueError(
                    f"{self._hf}: {name} is {list(there[name].shape)}, but its config.json makes it {list(shape)}: "
                    "give the config.json that came with the weights."
                )
        for name, spec in there.items():
            if name == _TIED_OUTPUT and name not in expected:
                self._check_tied(spec)
            elif name not in expected:
                raise ValueError(
                    f"{self._hf} has the tensor {name} {list(spec.shape)}, which this model has no place for: give another model."
                )

    def _their_shapes(self, key: str, layer: int | None, link: Link) -> dict[str, tuple[int, ...]]:
        shape = self._shapes[key] if layer is None else self._shapes[key][1:]
        if key in (_WORDS, _OUTPUT):
            shape = (self._pretrained.vocab_size, *shape[1:])
        parts = split(link, torch.empty(shape, device="meta"), heads=self._heads)
        return {name: tuple(part.shape) for name, part in parts.items()}

    def _check_tied(self, spec: TensorSpec) -> None:
        words = self._weights.specs[_THEIR_WORDS]
        if spec != words or not torch.equal(self._weights.read(_TIED_OUTPUT), self._weights.read(_THEIR_WORDS)):
            raise ValueError(
                f"{self._hf}: {_TIED_OUTPUT} differs from {_THEIR_WORDS}, but config.json says that they are one: "
                "set tie_word_embeddings to false there if the model has an output layer of its own."
            )

    def _dtype_of(self, key: str) -> torch.dtype:
        """The one type of all that a tensor is made of."""
        first: dict[torch.dtype, str] = {}
        for name in (name for (of, _), link in self._links.items() if of == key for name in link.theirs):
            first.setdefault(self._weights.specs[name].dtype, name)
        dtype, *others = first
        if others:
            raise ValueError(
                f"{self._hf}: {first[dtype]} is {dtype}, but {first[others[0]]} is {others[0]}: save the model in one type."
            )
        return dtype


def _with_mean_rows(rows_VD: Tensor, *, copied: int, rows: int) -> Tensor:
    """The first `copied` rows of [V, D], and their mean in all that follow, [rows, D].

    A new token's logit is then about the mean of all, and does not drown those the model was trained to give (Hewitt 2021,
    "Initializing New Word Embeddings for Pretrained Language Models").
    """
    rows_VD = rows_VD[:copied]
    resized = rows_VD.new_empty((rows, *rows_VD.shape[1:]))
    resized[:copied] = rows_VD
    # Block by block, for torch would first make all rows fp64.
    total_D = torch.stack([block_KD.sum(dim=0, dtype=torch.float64) for block_KD in rows_VD.split(_ROWS_AT_ONCE)]).sum(dim=0)
    resized[copied:] = total_D / copied
    return resized
