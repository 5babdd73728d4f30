"""Weights of distributed checkpoints, read and written tensor by tensor in one process, without process groups.

A run's checkpoint is written and read by all its ranks together (`training/saving.py`). What converts one needs neither ranks nor
the model: here are the same files, with no more in memory than one tensor, or one layer of those that have layers stacked.
"""

from __future__ import annotations

import math
import pickle
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult

from mmar_megatron.engine.sharding import AVERAGE_PREFIX
from mmar_megatron.training import manifest
from mmar_megatron.training.checkpoint import CONFIG
from mmar_megatron.training.saving import reason_of, write_small

_STACKED = "decoder.layers."
_NO_WEIGHTS = "optimizer."
_FILE_BYTES = 4 * 10**9
_SECONDS_BETWEEN_LINES = 5.0


class TensorSpec(NamedTuple):
    """What a tensor is before it is read."""

    shape: tuple[int, ...]
    """Where layers are stacked, their number first."""
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize


def is_stacked(key: str) -> bool:
    """Whether a checkpoint's tensor holds all layers, stacked along its first axis."""
    return key.removeprefix(AVERAGE_PREFIX).startswith(_STACKED)


def pieces(tensors: Mapping[str, TensorSpec]) -> Iterator[tuple[str, int | None]]:
    """Each tensor, or each layer of it where they are stacked, as (key, layer)."""
    for key, spec in tensors.items():
        yield from ((key, layer) for layer in (range(spec.shape[0]) if is_stacked(key) else (None,)))


# --- reading --------------------------------------------------------------------------------------------------------------------


class CheckpointReader:
    """Opens a checkpoint's index; whether its files are as they were written is `training.checkpoint`'s to find out.

    Attributes:
        tensors: the weights, and their moving average under names with `AVERAGE_PREFIX`; not the optimizer's state.

    Raises:
        ValueError: there is none, or it makes no sense.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._reader = FileSystemReader(path)
        try:
            self._metadata = self._reader.read_metadata()
        except FileNotFoundError as error:
            raise ValueError(f"{path} is no checkpoint (it has no .metadata): give a directory step_XXXXXXXX") from error
        except (pickle.UnpicklingError, EOFError, AttributeError) as error:
            raise ValueError(f"The index of the checkpoint {path} makes no sense ({error}): give another one.") from error
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        self._stored = {
            key: stored
            for key, stored in self._metadata.state_dict_metadata.items()
            if isinstance(stored, TensorStorageMetadata) and not key.startswith(_NO_WEIGHTS)
        }
        self.tensors = {key: TensorSpec(tuple(stored.size), stored.properties.dtype) for key, stored in self._stored.items()}

    def read(self, key: str, layer: int | None = None) -> Tensor:
        """One tensor, whole, from whatever pieces it was saved in.

        Args:
            key: its name in the checkpoint.
            layer: of a tensor that has its layers stacked, this one alone; without it all of them.

        Raises:
            ValueError: a part of it is not in the checkpoint.
        """
        shape = self.tensors[key].shape
        offsets = (0,) * len(shape)
        if layer is not None:
            offsets, shape = (layer, *offsets[1:]), (1, *shape[1:])
        chunk = ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(shape))
        items = create_read_items_for_chunk_list(key, self._stored[key], [chunk])
        if sum(math.prod(item.lengths) for item in items) != math.prod(shape):
            raise ValueError(f"The checkpoint {self._path} lacks a part of {key}: give another one.")
        tensor = torch.empty(shape, dtype=self.tensors[key].dtype)
        self._reader.read_data(LoadPlan(items), _Into(tensor)).wait()
        return tensor if layer is None else tensor[0]


class _Into(DefaultLoadPlanner):
    """Lets torch's reader put all it reads into one tensor."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self._tensor = tensor

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        target = self._tensor
        for axis, (offset, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            target = target.narrow(axis, offset, length)
        return target

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """It is in place already."""


# --- writing --------------------------------------------------------------------------------------------------------------------


def write_checkpoint(
    out: Path,
    tensors: Mapping[str, TensorSpec],
    read: Callable[[str, int | None], Tensor],
    *,
    config_yaml: str,
    facts: dict[str, Any],
    say: Callable[[str], object] = print,
) -> None:
    """Write a checkpoint of weights that loads in any layout: all of it, or nothing.

    Args:
        out: its directory, which must not exist.
        tensors: what it will hold.
        read: gives a tensor, of one layer where they are stacked; called once for each, in the order of `tensors`.
        config_yaml: the configuration that goes with it.
        facts: for its manifest.
        say: is told how far it is, every few seconds.

    Raises:
        ValueError: `out` exists.
        OSError: the disk is too full or cannot be written.
    """
    needed = sum(spec.nbytes for spec in tensors.values())
    with all_or_nothing(out, needed=needed) as partial:
        pace = Pace(pieces=sum(1 for _ in pieces(tensors)), nbytes=needed, say=say)
        files = _write_tensors(partial, tensors, read, pace=pace)
        files += write_small(partial, {COMMON_STATE_FNAME: {}, CONFIG: config_yaml})
        with ThreadPoolExecutor() as threads:
            records = threads.map(manifest.record, (partial / name for name in files))
            manifest.write(partial, files=dict(zip(files, records, strict=True)), facts=facts)


@contextmanager
def all_or_nothing(out: Path, *, needed: int) -> Iterator[Path]:
    """A directory to fill, which is `out`, safe on the disk, when all went well, and gone when not.

    Args:
        out: must not exist.
        needed: bytes that will be written.

    Raises:
        ValueError: `out` exists.
        OSError: the disk is too full or cannot be written.
    """
    if out.exists():
        raise ValueError(f"{out} exists: remove it or choose another --out")
    there = next(parent for parent in out.absolute().parents if parent.exists())
    if (free := shutil.disk_usage(there).free) < needed:
        raise OSError(f"{out} takes {needed / 1e9:,.2f} GB, and {there} has {free / 1e9:,.2f} GB left: make room")
    partial = out.with_name(f".{out.name}.{secrets.token_hex(4)}.partial")
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in (*partial.rglob("*"), partial):
            manifest.flush(path)
        partial.rename(out)
        manifest.flush(out.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write_tensors(
    directory: Path,
    tensors: Mapping[str, TensorSpec],
    read: Callable[[str, int | None], Tensor],
    *,
    pace: Pace,
) -> list[str]:
    """The files of tensors and their index; returns their names. torch's own writer would keep every tensor until the last."""
    stored = {
        key: TensorStorageMetadata(TensorProperties(dtype=spec.dtype), torch.Size(spec.shape), chunks=[])
        for key, spec in tensors.items()
    }
    results: list[WriteResult] = []
    files = _Files(directory)
    try:
        for key, layer in pieces(tensors):
            tensor = read(key, layer) if layer is None else read(key, layer)[None]
            first = 0 if layer is None else layer
            assert tensor.shape[1:] == tensors[key].shape[1:] and tensor.dtype == tensors[key].dtype, (key, tensors[key])
            chunk = ChunkStorageMetadata(torch.Size((first, *(0 for _ in tensor.shape[1:]))), tensor.shape)
            stored[key].chunks.append(chunk)
            results.append(files.append(MetadataIndex(key, chunk.offsets), tensor))
            pace.done(tensor.nbytes)
            del tensor  # else it would stay until the next one is there
    finally:
        files.close()
    FileSystemWriter(directory).finish(Metadata({**stored}), [results])
    return [*files.names, ".metadata"]


class _Files:
    """Tensors one after the other, in files of some gigabytes with the names that megatron-core gives them."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._file: IO[bytes] | None = None
        self.names: list[str] = []

    def append(self, index: MetadataIndex, tensor: Tensor) -> WriteResult:
        """Write a tensor; returns where it lies. Raises OSError where it cannot."""
        if self._file is None or self._file.tell() >= _FILE_BYTES:
            self.close()
            self.names.append(f"__0_{len(self.names)}.distcp")
            self._file = (self._directory / self.names[-1]).open("wb")
        begin = self._file.tell()
        # A view would be saved with all of the storage behind it.
        tensor = tensor.clone() if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor
        try:
            torch.save(tensor, self._file)
        except RuntimeError as error:
            raise OSError(reason_of(error)) from error
        length = self._file.tell() - begin
        return WriteResult(index, length, _StorageInfo(self.names[-1], begin, length))

    def close(self) -> None:
        """End the file that is being written."""
        if self._file is not None:
            self._file.close()


class Pace:
    """Tells how far a conversion is and how long it will take, every few seconds.

    Args:
        pieces: tensors there will be.
        nbytes: their size.
        say: is told.
    """

    def __init__(self, *, pieces: int, nbytes: int, say: Callable[[str], object]) -> None:
        self._say = say
        self._pieces, self._bytes = pieces, nbytes
        self._pieces_done = self._bytes_done = 0
        self._begin = self._last = time.monotonic()

    def done(self, nbytes: int) -> None:
        """Another piece is done."""
        self._pieces_done += 1
        self._bytes_done += nbytes
        now = time.monotonic()
        if now - self._last < _SECONDS_BETWEEN_LINES and self._pieces_done < self._pieces:
            return
        self._last = now
        left = (now - self._begin) * (self._bytes - self._bytes_done) / self._bytes_done
        self._say(
            f"{self._pieces_done} of {self._pieces} tensors, {self._bytes_done / 1e9:,.2f} of {self._bytes / 1e9:,.2f} GB, "
            f"{left:,.0f} s left"
        )
