"""The hidden directory beside the final one that holds what is done, so that a killed preparation goes on where it was.

.NAME.unfinished/settings.json    what is being prepared, of which inputs; written when the blocks are
.NAME.unfinished/blocks/          where each block's records are
.NAME.unfinished/looks/           of each block, its records' fates (see `look`); done where the .json is
.NAME.unfinished/plan.json        which records come into which shard (see `plan`)
.NAME.unfinished/parts/           of each shard that is whole, its columns; done where the .json is
.NAME.unfinished/data/            becomes NAME
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmar_megatron.data.preparation.records import Block, Source

_POLL_SECONDS = 0.2
_AFTER_LOOKING = ("vocab_size", "validation", "samples_per_shard", "text_tokens", "encoder_batch", "encoders", "keep_pictures")
"""Settings that may be others as long as nothing is planned: looks do not depend on them."""


def atomically(file: Path, content: bytes) -> None:
    """Writes a file that is there in full or not at all."""
    unfinished = file.with_name(f".{file.name}.unfinished")
    unfinished.write_bytes(content)
    unfinished.replace(file)


class Finished(Exception):
    """The data set has its name already: other ranks had all the work. Were it older, rank 0 would end all of them."""


class Unfinished:
    """One rank's view of the directory.

    Args:
        out: the final directory.
        rank: this process; rank 0 begins, plans and finishes.
        ranks: processes that share the work through a common file system.

    Raises:
        ValueError: `out` exists (rank 0).
    """

    def __init__(self, out: Path, *, rank: int = 0, ranks: int = 1) -> None:
        self.out = out
        self.rank, self.ranks = rank, ranks
        self.path = out.with_name(f".{out.name}.unfinished")
        self.looks, self.parts, self.data = self.path / "looks", self.path / "parts", self.path / "data"
        self._blocks = self.path / "blocks"
        self._lock: int | None = None
        if rank == 0 and out.exists():
            if not self.data.exists():
                self.remove()  # what a run left that was killed after its last step but one
            raise ValueError(f"{out} exists: remove it or choose another --out")

    def begin(self, source: Source, settings: dict[str, Any], *, anew: bool) -> int:
        """Makes the directory, or goes on with the one that is there (or, `anew`, empties it); the number of blocks.

        Raises:
            Finished: the other ranks left nothing to do.
            ValueError: another process is at it, or what is there was begun with other settings or inputs.
        """
        settings = json.loads(json.dumps(settings))
        file = self.path / "settings.json"
        if self.rank:
            self.wait(file, until=lambda: json.loads(file.read_bytes())["settings"] == settings)  # as rank 0 sees to
            self._take_lock()
            return int(json.loads(file.read_bytes())["blocks"])
        self.path.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        if anew or not self.data.exists():  # which one that was killed while it removed the rest has given its name
            for left_over in [file, self.path / "plan.json", *self.looks.glob("*.json"), *self.parts.glob("*.json")]:
                left_over.unlink(missing_ok=True)
            shutil.rmtree(self.data, ignore_errors=True)
        if file.exists():
            self._check(settings)
        for folder in (self._blocks, self.looks, self.parts, self.data):
            folder.mkdir(exist_ok=True)
        inputs = hashlib.sha256()
        for path in source.inputs():
            stat = path.stat()
            inputs.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        number = 0
        fresh = not file.exists()
        for number, block in enumerate(source.blocks(), start=1):
            content = json.dumps(block, ensure_ascii=False).encode()
            inputs.update(content)
            if fresh:
                (self._blocks / f"{number - 1:06d}.json").write_bytes(content)
        summary = {"settings": settings, "inputs": inputs.hexdigest(), "blocks": number}
        if not fresh and json.loads(file.read_bytes())["inputs"] != summary["inputs"]:
            raise ValueError(f"the inputs of {self.out} changed since {self.path} was begun: remove that to begin anew")
        atomically(file, json.dumps(summary, ensure_ascii=False).encode())
        return number

    def _check(self, settings: dict[str, Any]) -> None:
        before = json.loads((self.path / "settings.json").read_bytes())["settings"]
        names = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
        if not (self.path / "plan.json").exists():
            names = [name for name in names if name not in _AFTER_LOOKING]
        if names:
            differ = ", ".join(f"{name} was {before.get(name)!r} and is {settings.get(name)!r}" for name in names)
            raise ValueError(
                f"{self.path} was begun with other settings ({differ}): give those to go on, or remove it to begin anew"
            )

    def _take_lock(self) -> None:
        self._lock = os.open(self.path / f"rank-{self.rank}.lock", os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # which ends with the process, however it ends
        except OSError as error:
            self.release()
            raise ValueError(f"another process is preparing {self.out}: wait for it, or choose another --out") from error

    def block(self, number: int) -> Block:
        """Where a block's records are."""
        return read_block(self._blocks, number)

    @property
    def blocks(self) -> Path:
        """The folder of the blocks."""
        return self._blocks

    def wait(self, file: Path, *, until: Callable[[], bool] = lambda: True) -> None:
        """Returns when the file, which another rank makes, is there and as it should be.

        Raises:
            Finished: the data set is there instead.
        """
        while not (file.exists() and until()):
            if self.rank and self.out.exists():
                raise Finished
            time.sleep(_POLL_SECONDS)

    def finish(self) -> None:
        """Gives the data set its name, and removes everything else."""
        self.data.rename(self.out)
        self.remove()

    def remove(self) -> None:
        """Removes the directory."""
        self.release()
        shutil.rmtree(self.path, ignore_errors=True)

    def release(self) -> None:
        """Lets others go on with it."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def read_block(folder: Path, number: int) -> Block:
    """One of the blocks."""
    return Block(*json.loads((folder / f"{number:06d}.json").read_bytes()))
