"""Compares an export with the checkpoint it was made of: every tensor to the bit, and every file that goes with them."""

from __future__ import annotations

import filecmp
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from mmar_megatron.hf.exporting import Exportable, config_json, copies_of, files_of
from mmar_megatron.hf.storage import Pace
from mmar_megatron.hf.weights import HuggingFaceWeights

_WORDS = "model.embed_tokens.weight"
_MAY_DIFFER = ("README.md",)
"""Made to be written on."""
_CHANGES_LOADING = (
    *("adapter_config.json", "added_tokens.json", "chat_template.jinja", "chat_template.json", "merges.txt"),
    *("preprocessor_config.json", "tokenizer.model", "vocab.json"),
)
"""Files that an export has not, and that transformers would heed."""
_VERSIONS = ("transformers_version", "mmar_megatron_version")
_BESIDE = frozenset(
    (
        *("use_cache", "auto_map", "backend", "is_local", "local_files_only", "model_max_length", "extra_special_tokens"),
        *("added_tokens_decoder", *_VERSIONS),
    )
)
"""Fields of JSON files that transformers writes beside those of an export when it saves what it has loaded."""


@dataclass(kw_only=True)
class Comparison:
    """What was found. Names as in the export."""

    tensors: int = 0
    different: dict[str, float] = field(default_factory=dict)
    """Of each tensor that differs, the largest difference relative to its largest value; infinite where a value is not finite."""
    missing: list[str] = field(default_factory=list)
    """Tensors of the checkpoint that the export lacks, or has in another shape."""
    extra: list[str] = field(default_factory=list)
    """Tensors of the export that the checkpoint has no counterpart for."""
    files: list[str] = field(default_factory=list)
    """Other files that are missing, or not what an export would have."""

    @property
    def equal(self) -> bool:
        """Whether the export is what its source says, to the last bit."""
        return not (self.different or self.missing or self.extra or self.files)

    def __str__(self) -> str:
        lines = [f"{self.tensors} tensors compared, {self.tensors - len(self.different)} equal to the bit"]
        if self.different:
            worst = max(self.different, key=lambda name: self.different[name])
            lines.append(f"worst {worst}: differs by {self.different[worst]:.3g} of its largest value")
        lines += [f"missing, or of another shape: {name}" for name in self.missing[:10]]
        lines += [f"of no place in the checkpoint: {name}" for name in self.extra[:10]]
        lines += [f"not as an export has it: {name}" for name in self.files]
        return "\n".join(lines)


def compare(source: Exportable, directory: Path, *, say: Callable[[str], None] = print) -> Comparison:
    """Reads both sides tensor by tensor.

    Args:
        source: the opened checkpoint.
        directory: an export. What it holds in another number format is compared in that format.
        say: is told how far it is, every few seconds.

    Raises:
        ValueError: the directory has no weights, or not whole ones.
    """
    weights = HuggingFaceWeights(directory)
    found = Comparison()
    pace = Pace(pieces=len(source.links), nbytes=source.total_bytes, say=say)
    unseen = set(weights.specs)
    for link in source.links:
        for name, ours in source.tensors(link).items():
            unseen.discard(name)
            if name not in weights.specs or weights.specs[name].shape != tuple(ours.shape):
                found.missing.append(name)
                continue
            found.tensors += 1
            difference = _difference(ours, weights.read(name))
            if difference is not None:
                found.different[name] = difference
        pace.done(source.nbytes(link))
    found.extra = sorted(unseen)
    files = files_of(source)
    if _WORDS in weights.specs:  # they may have been exported in another type than they are stored in
        files["config.json"] = config_json(replace(source, dtype=weights.specs[_WORDS].dtype))
    for name, text in files.items():
        if not (directory / name).is_file() or (name not in _MAY_DIFFER and not _is(directory / name, text)):
            found.files.append(name)
    found.files += [name for name in _CHANGES_LOADING if (directory / name).exists()]
    for name, file in copies_of(source).items():
        if not (directory / name).is_file() or not filecmp.cmp(file, directory / name, shallow=False):
            found.files.append(name)
    return found


def _difference(ours: Tensor, theirs: Tensor) -> float | None:
    """None where the bits are the same: 0 is not -0 then, and what is no number is itself."""
    ours = ours.to(theirs.dtype)
    if torch.equal(ours.flatten().view(torch.uint8), theirs.flatten().view(torch.uint8)):
        return None
    largest = (ours.double() - theirs.double()).abs().max().item()
    return largest / max(ours.double().abs().max().item(), 1e-30) if largest == largest else float("inf")


def _is(file: Path, text: str) -> bool:
    """Whether a file holds this; of JSON, what transformers writes beside it does not count."""
    found = file.read_text()
    if file.suffix != ".json":
        return found == text
    try:
        expected, there = json.loads(text), json.loads(found)
    except ValueError:
        return False
    if not isinstance(there, dict) or there.keys() - expected.keys() - _BESIDE:
        return False
    return all(name in there and there[name] == value for name, value in expected.items() if name not in _VERSIONS)
