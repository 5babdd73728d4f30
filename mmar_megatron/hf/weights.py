"""The tensors of a Hugging Face directory: what there is, from the headers alone, and each when it is wanted."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from mmar_megatron.data.weights import check_whole
from mmar_megatron.hf.storage import TensorSpec

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_COMPUTED = re.compile(r".*\.rotary_emb\.inv_freq")
"""Tensors that some versions of transformers saved though they follow from the config."""


class HuggingFaceWeights:
    """Opens `model.safetensors`, or the shards that `model.safetensors.index.json` names.

    Attributes:
        specs: shape and type of each tensor.

    Raises:
        ValueError: there are none, or not all of them, or some of another type than fp32, bf16 and fp16.
    """

    def __init__(self, directory: Path) -> None:
        self._files = {name: file for name, file in _places(directory).items() if not _COMPUTED.fullmatch(name)}
        self.specs: dict[str, TensorSpec] = {}
        for file in dict.fromkeys(self._files.values()):
            with safe_open(file, framework="pt") as shard:
                self.specs |= {name: _spec(shard, name, file=file) for name in self._files if self._files[name] == file}

    def read(self, name: str) -> Tensor:
        """One tensor. It lies in the file's pages until it is computed with."""
        with safe_open(self._files[name], framework="pt") as shard:  # opened anew, so that pages are given back with the tensor
            return shard.get_tensor(name)


def _places(directory: Path) -> dict[str, Path]:
    """The file of each tensor, every file found to be whole."""
    if (directory / SINGLE).is_file():
        return dict.fromkeys(sorted(_names_in(directory / SINGLE)), directory / SINGLE)
    if not (directory / INDEX).is_file():
        raise ValueError(_what_is_there_instead(directory))
    try:
        shard_of = {name: str(shard) for name, shard in json.loads((directory / INDEX).read_text())["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{directory / INDEX} makes no sense: copy it again") from error
    there = {}
    for shard in sorted(set(shard_of.values())):
        if not (directory / shard).is_file():
            raise ValueError(f"{directory / shard} is missing, which {INDEX} names: copy it too")
        there[shard] = _names_in(directory / shard)
    for name, shard in shard_of.items():
        if name not in there[shard]:
            raise ValueError(f"{directory / shard} has no tensor {name}, though {INDEX} says so: copy both again")
    return {name: directory / shard for name, shard in shard_of.items()}


def _names_in(file: Path) -> set[str]:
    check_whole(file)
    with safe_open(file, framework="pt") as shard:
        return set(shard.keys())


def _what_is_there_instead(directory: Path) -> str:
    if any(directory.glob("pytorch_model*.bin*")):
        return (
            f"{directory} has its weights in pytorch_model.bin alone, which could run as a program: convert it to safetensors "
            "(load it with transformers and save it with save_pretrained)"
        )
    if any(directory.glob("*.safetensors")):
        return f"{directory} has shards of weights, but no {INDEX} that says what is in them: copy it too"
    return f"{directory} has neither {SINGLE} nor {INDEX}: give the directory of a Hugging Face model"


def _spec(shard: safe_open, name: str, *, file: Path) -> TensorSpec:
    part = shard.get_slice(name)
    if (dtype := _DTYPES.get(part.get_dtype())) is None:
        raise ValueError(f"{file}: {name} is of the type {part.get_dtype()}, which is none of {', '.join(_DTYPES)}: convert it")
    return TensorSpec(tuple(part.get_shape()), dtype)
