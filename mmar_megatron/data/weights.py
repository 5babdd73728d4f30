"""Files of weights of other people's networks: whether they are whole, and what tells them apart."""

from __future__ import annotations

import hashlib
import json
import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_HASHED_WHOLE = 64 * 2**20
_HASHED_BLOCKS, _BLOCK_BYTES = 512, 2**14


def check_whole(file: Path) -> None:
    """Looks at the header alone.

    Raises:
        ValueError: the file is shorter or longer than it says itself, or no weights at all.
    """
    whole = _is_whole_safetensors(file) if file.suffix == ".safetensors" else zipfile.is_zipfile(file)
    if not whole:
        raise ValueError(f"{file} is cut off or no file of weights: copy it again")


def _is_whole_safetensors(file: Path) -> bool:
    """Whether it is as long as its header says: 8 bytes of length, the header in JSON, the tensors."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        if len(start) < 8 or (length := struct.unpack("<Q", start)[0]) > size - 8:
            return False
        try:
            header = json.loads(stream.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, AttributeError, KeyError, TypeError):
            return False
    return size == 8 + length + max(ends, default=0)


def weights_hash(config: dict[str, Any], files: Sequence[Path]) -> str:
    """The first 32 hexadecimal digits of a SHA-256 over a config and files of weights; of a file above 64 MiB 8 MiB are read.

    Every rank asks for it at every start, and the weights of SD and FLUX are hundreds of megabytes that a run on cached moments
    would not read otherwise. So a large file is represented by its size and 512 blocks of 16 KiB, evenly spaced from its very
    first byte (names, types and shapes) to its very last. Training moves every tensor, so other weights are told apart; single
    damaged bytes between the blocks are not. The config enters without the entries that libraries write for themselves (their
    version, where it was loaded from), and where the files lie does not enter at all.
    """
    kept = {key: value for key, value in config.items() if not key.startswith("_") and key != "transformers_version"}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode())
    for file in files:
        size = file.stat().st_size
        digest.update(struct.pack("<Q", size))
        with file.open("rb") as stream:
            if size <= _HASHED_WHOLE:
                digest.update(stream.read())
            else:
                for number in range(_HASHED_BLOCKS):
                    stream.seek((size - _BLOCK_BYTES) * number // (_HASHED_BLOCKS - 1))
                    digest.update(stream.read(_BLOCK_BYTES))
    return digest.hexdigest()[:32]
