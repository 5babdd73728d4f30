"""Damage to checkpoints, as disks and interrupted copies do it, and a look at whether a checkpoint is whole."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from random import Random
from typing import Literal, get_args

MANIFEST = "manifest.json"
Kind = Literal["truncated file", "flipped bit", "missing file", "empty manifest", "half directory"]
KINDS: tuple[Kind, ...] = get_args(Kind)


def checkpoints(run_dir: Path) -> list[Path]:
    """What stands under a final name, oldest first, whole or not."""
    return sorted(path for path in (run_dir / "checkpoints").glob("step_*") if re.fullmatch(r"step_\d{8}", path.name))


def is_whole(checkpoint: Path) -> bool:
    """Whether all files are there and as the manifest says.

    The package has a check of its own. It is what is tried here, so this one shares nothing with it.
    """
    try:
        files = json.loads((checkpoint / MANIFEST).read_text())["files"]
        return all(
            (checkpoint / name).stat().st_size == entry["bytes"]
            and hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() == entry["sha256"]
            for name, entry in files.items()
        )
    except (OSError, ValueError):
        return False


def damage(checkpoint: Path, kind: Kind, *, rng: Random, next_step: int) -> Path:
    """Damage a whole checkpoint; a half directory is a copy of it that was cut off, under the name of `next_step`.

    Returns:
        What is damaged now.
    """
    names = sorted(json.loads((checkpoint / MANIFEST).read_text())["files"])
    if kind == "half directory":
        return _cut_off_copy(checkpoint, checkpoint.with_name(f"step_{next_step:08d}"), names=names, rng=rng)
    victim = checkpoint / rng.choice(names)
    if kind == "empty manifest":
        (checkpoint / MANIFEST).write_bytes(b"")
    elif kind == "missing file":
        victim.unlink()
    elif kind == "truncated file":
        with victim.open("r+b") as file:
            file.truncate(rng.randrange(victim.stat().st_size))
    else:
        content = bytearray(victim.read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        victim.write_bytes(content)
    return checkpoint


def _cut_off_copy(source: Path, target: Path, *, names: list[str], rng: Random) -> Path:
    """Some files whole, one in part, the others not at all; the manifest may be among the first."""
    target.mkdir()
    order = [*names, MANIFEST]
    rng.shuffle(order)
    whole = rng.randrange(len(order))
    for name in order[:whole]:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)
    content = (source / order[whole]).read_bytes()
    (target / order[whole]).parent.mkdir(parents=True, exist_ok=True)
    (target / order[whole]).write_bytes(content[: len(content) // 2])
    return target
