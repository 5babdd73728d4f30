"""Exporting a checkpoint, and importing the export: how much memory that takes, and how long."""

from __future__ import annotations

import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from mmar_megatron.config import parse_command_line
from mmar_megatron.data.codec import build_codec
from mmar_megatron.data.tokenizer import load_tokenizer, train_sentencepiece
from mmar_megatron.hf.exporting import checkpoint_shapes, export, hugging_face_config, open_checkpoint
from mmar_megatron.hf.importing import import_model
from mmar_megatron.hf.storage import TensorSpec, write_checkpoint
from mmar_megatron.training.checkpoint import Progress
from mmar_megatron.training.saving import facts_of

_CONFIG = "config.yaml"


def measure_export(options: Sequence[str], *, shard_gb: float, directory: Path | None) -> dict[str, Any]:
    """Peak memory and seconds, of the whole process and beside what it has before it begins.

    Args:
        options: of pretrain_mmar.py; weights are random, in fp32, and the vocabulary is what padding makes of 280 pieces.
        shard_gb: most that a file of exported weights has.
        directory: on the storage to be used; none: the system's temporary one.
    """
    with tempfile.TemporaryDirectory(dir=directory, prefix="benchmark-") as name:
        folder = Path(name)
        parameters = _in_a_process(partial(write_random_checkpoint, options, folder=folder))["result"]
        exported = _in_a_process(partial(_export, folder, shard_bytes=round(shard_gb * 1e9)))
        largest = max(file.stat().st_size for file in (folder / "hf").glob("*.safetensors"))
        shutil.rmtree(folder / "checkpoint")
        imported = _in_a_process(partial(_import, folder))
    return {
        "parameters": parameters,
        "largest_file_gb": round(largest / 1e9, 3),
        **{f"export_{name}": exported[name] for name in ("seconds", "peak_gb", "before_gb")},
        "export_above_largest_file_gb": round(exported["peak_gb"] - largest / 1e9, 3),
        **{f"import_{name}": imported[name] for name in ("seconds", "peak_gb", "before_gb")},
    }


def write_random_checkpoint(options: Sequence[str], *, folder: Path) -> int:
    """FOLDER/checkpoint with its tokenizer beside it; returns the number of parameters."""
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(train_sentencepiece(["a few words"] * 10, vocab_size=280))
    line = parse_command_line([*options, "--data.tokenizer", str(folder / "tokenizer.model")])
    tokenizer, codec = load_tokenizer(folder / "tokenizer.model"), build_codec(line.config.data.codec)
    shapes = checkpoint_shapes(hugging_face_config(line.config, tokenizer=tokenizer, codec=codec))
    fingerprints = {"tokenizer": tokenizer.fingerprint, "codec": codec.fingerprint}
    layout = {"tensor": 1, "pipeline": 1, "data": 1}
    write_checkpoint(
        folder / "checkpoint",
        {key: TensorSpec(shape, torch.float32) for key, shape in shapes.items()},
        lambda key, layer: torch.randn(shapes[key] if layer is None else shapes[key][1:]),
        config_yaml=line.yaml,
        facts=facts_of(Progress(fingerprints=fingerprints), engine="native", layout=layout, average=False, config_yaml=line.yaml),
        say=_say_nothing,
    )
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def _export(folder: Path, *, shard_bytes: int) -> None:
    export(open_checkpoint(folder / "checkpoint", say=_say_nothing), folder / "hf", shard_bytes=shard_bytes, say=_say_nothing)
    shutil.copyfile(folder / "checkpoint" / _CONFIG, folder / _CONFIG)


def _import(folder: Path) -> None:
    import_model(folder / "hf", folder / "again", configs=[str(folder / _CONFIG)], say=_say_nothing)


def _in_a_process(work: Callable[[], Any]) -> dict[str, Any]:
    """What it gives, its seconds, and the most memory that its process ever had: in another's, earlier work would be counted."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(_measured, work).result()


def _measured(work: Callable[[], Any]) -> dict[str, Any]:
    before, begin = _peak_gb(), time.perf_counter()
    result = work()
    return {"result": result, "seconds": round(time.perf_counter() - begin, 1), "peak_gb": _peak_gb(), "before_gb": before}


def _peak_gb() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 3)


def _say_nothing(_: str) -> None: ...
