"""The index of a data set that is not there: opening it, planning with it, and how the order moves over its shards."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mmar_megatron.benchmarks.timing import median
from mmar_megatron.config import parse_command_line
from mmar_megatron.data.codec import build_codec
from mmar_megatron.data.draw import ShuffledOrder
from mmar_megatron.data.index import PAIR, Shard, write_index
from mmar_megatron.data.source import SINGLE, DataSource
from mmar_megatron.data.tokenizer import load_tokenizer, train_sentencepiece

if TYPE_CHECKING:
    from mmar_megatron.config import DataConfig

_SAMPLE_BYTES = 16384
_SHARD_SAMPLES = 4096
_READS = 1000


def measure_index(options: Sequence[str], *, samples: int, windows: int) -> dict[str, Any]:
    """Seconds and memory of opening and planning, and how far apart the samples of consecutive positions lie.

    Args:
        options: of pretrain_mmar.py; of a data set, those of what it was made for.
        samples: each a picture with a caption of 10 to 100 tokens.
        windows: planned one after the other, with packing.
    """
    config = parse_command_line(options).config
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        data = replace(config.data, path=folder, sources={}, tokenizer=None, languages=["en"], packing=True)
        write_synthetic_index(Path(folder), data=data, samples=samples)
        # In a process of its own, for this one has memory to spare from writing.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            found = process.submit(open_and_plan, data, seed=config.seed, windows=windows).result()
    return {"samples": samples, **found, **locality(data, samples=samples, seed=config.seed)}


def open_and_plan(data: DataConfig, *, seed: int, windows: int) -> dict[str, Any]:
    """Seconds, and the growth of this process."""
    begin_bytes, times = resident_bytes(), [time.perf_counter()]
    planner = DataSource(data).planner(seed=seed)
    times.append(time.perf_counter())
    open_bytes = resident_bytes()
    for number in range(windows):
        planner.window(number * data.packing_window, places={SINGLE: number * data.packing_window})
        times.append(time.perf_counter())
    end_bytes = resident_bytes()
    seconds = np.diff(times)
    return {
        "open_s": round(float(seconds[0]), 4),
        "first_window_s": round(float(seconds[1]), 4),
        "last_window_s": round(float(seconds[-1]), 4),
        "window_s": median(seconds[1:].tolist()),
        "open_mb": {kind: round((open_bytes[kind] - begin_bytes[kind]) / 1e6, 1) for kind in begin_bytes},
        "planned_mb": {kind: round((end_bytes[kind] - begin_bytes[kind]) / 1e6, 1) for kind in begin_bytes},
    }


def write_synthetic_index(folder: Path, *, data: DataConfig, samples: int) -> None:
    """The index and the tokenizer of a data set without tars."""
    codec = build_codec(data.codec)
    (folder / "tokenizer.model").write_bytes(train_sentencepiece(["a few words"] * 10, vocab_size=280))
    starts = range(0, samples, _SHARD_SAMPLES)
    sizes = [min(_SHARD_SAMPLES, samples - start) for start in starts]
    random = np.random.default_rng(0)
    columns: list[dict[str, NDArray[Any]]] = [
        {
            "offset": np.arange(size, dtype=np.uint64) * _SAMPLE_BYTES,
            "size": np.full(size, _SAMPLE_BYTES, np.uint32),
            "kind": np.full(size, PAIR, np.uint8),
            "images": np.ones(size, np.uint16),
            "learned": np.zeros(size, np.uint32),
            "paints": np.zeros(size, np.uint8),
            "texts": np.ones(size, np.uint8),
            "text_tokens": random.integers(10, 101, size, dtype=np.uint32),
            "text_language": np.zeros(size, np.uint8),
        }
        for size in sizes
    ]
    write_index(
        folder,
        shards=[
            Shard(name=f"train-{k:06d}.tar", split="train", samples=size, bytes=size * _SAMPLE_BYTES, sha256=f"{k:064x}")
            for k, size in enumerate(sizes)
        ],
        columns=columns,
        made_by={"source": "benchmark"},
        image_size=codec.image_size,
        codec=codec.fingerprint,
        tokenizer=load_tokenizer(folder).fingerprint,
        num_tokens=codec.num_tokens,
        channels=codec.channels,
        pictures=True,
        moments=False,
        flipped=False,
        teacher=None,
        languages=["en"],
    )


def resident_bytes() -> dict[str, int]:
    """Of this process: what is its own, and what it shares with the system's cache of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = dict(line.split(":", 1) for line in lines)
    return {kind: int(found[key].split()[0]) * 1024 for kind, key in (("own", "RssAnon"), ("mapped_files", "RssFile"))}


def locality(data: DataConfig, *, samples: int, seed: int) -> dict[str, Any]:
    """Shares and medians over the first pools of an epoch."""
    order = ShuffledOrder(samples, seed=seed, epoch=0, block=data.shuffle_block, pool=data.shuffle_pool)
    count = min(samples, 4 * data.shuffle_pool) // _READS * _READS
    numbers = order(np.arange(count))
    step = np.abs(np.diff(numbers // data.shuffle_block))
    shards = [len(np.unique(reads)) for reads in (numbers // _SHARD_SAMPLES).reshape(-1, _READS)]
    pools = numbers[: count // data.shuffle_pool * data.shuffle_pool].reshape(-1, data.shuffle_pool)
    ranges = [1 + int((np.diff(np.sort(pool)) > 1).sum()) for pool in pools]
    return {
        "consecutive_reads_in_the_same_or_next_block": round(float((step <= 1).mean()), 4) if count else None,
        "shards_in_1000_reads": float(np.median(shards)) if shards else None,
        "contiguous_ranges_in_a_pool": float(np.median(ranges)) if ranges else None,
        "reads_in_a_pool": data.shuffle_pool,
    }
