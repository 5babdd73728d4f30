"""The model that a command works with, and what says later which one it was."""

from __future__ import annotations

import hashlib
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmar_megatron.hf.loading import load_model
from mmar_megatron.hf.modeling_mmar import MMARForCausalLM
from mmar_megatron.hf.processing_mmar import MMARProcessor
from mmar_megatron.training import manifest

_NO_WEIGHTS = (".md", ".py")
"""Of an export: files that change nothing of what it paints."""


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A model in evaluation mode, with its processor."""

    model: MMARForCausalLM
    processor: MMARProcessor
    facts: dict[str, Any]
    """model (its path), model_sha256, average, dtype; of a checkpoint also step and fingerprints."""

    @property
    def longest_text(self) -> int | None:
        """Positions of a sequence as in training; none where the model does not say."""
        return getattr(self.model.config, "max_position_embeddings", None)


def open_model(
    path: str, *, average: bool = False, dtype: str | None = None, tokenizer: str | None = None, vae: str | None = None
) -> Opened:
    """Loads a model. Arguments and errors as `load_model`'s; `dtype` by its name.

    Of a run, `facts` name the checkpoint that was its newest.
    """
    # Where a tokenizer is loaded beside a model of a type that transformers does not know, it doubts that they go together.
    logging.getLogger("transformers.configuration_utils").addFilter(lambda line: "model of type" not in line.getMessage())
    model, processor = load_model(
        path, average=average, dtype=getattr(torch, dtype) if dtype else None, tokenizer=tokenizer, vae=vae, say=_say
    )
    place = Path(model.name_or_path)
    facts = {"model": str(place), "average": average, "dtype": str(model.dtype).removeprefix("torch.")}
    return Opened(model=model, processor=processor, facts=facts | _identity(place))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _identity(place: Path) -> dict[str, Any]:
    """What tells the weights from others. A checkpoint's manifest has the digests of all of its files already."""
    if not (place / manifest.MANIFEST).is_file():
        return {"model_sha256": _digest(place)}
    content = manifest.read(place)
    text = (place / manifest.MANIFEST).read_text()
    return {"model_sha256": manifest.digest_of_text(text), "step": content["step"], "fingerprints": content["fingerprints"]}


def _digest(directory: Path) -> str:
    total = hashlib.sha256()
    for file in sorted(directory.rglob("*")):
        if file.is_file() and file.suffix not in _NO_WEIGHTS:
            with file.open("rb") as content:
                total.update(f"{file.relative_to(directory)} {hashlib.file_digest(content, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()
