"""Each kind of damage damages, and a look at the checkpoint tells."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from random import Random

import pytest

from mmar_megatron.chaos.damage import KINDS, MANIFEST, Kind, checkpoints, damage, is_whole

FILES = {"__0_0.distcp": bytes(range(256)) * 8, "__0_1.distcp": b"\0" * 3000, "common.pt": b"c", "metadata.json": b"{}"}


def make_checkpoint(run_dir: Path, step: int) -> Path:
    path = run_dir / "checkpoints" / f"step_{step:08d}"
    path.mkdir(parents=True)
    entries = {}
    for name, content in FILES.items():
        (path / name).write_bytes(content)
        entries[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path / MANIFEST).write_text(json.dumps({"step": step, "files": entries}))
    return path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(25))
def test_damages(kind: Kind, seed: int, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, 10)
    assert is_whole(path)
    damaged = damage(path, kind, rng=Random(seed), next_step=15)
    assert not is_whole(damaged)
    if kind == "half directory":
        assert is_whole(path)
        assert checkpoints(tmp_path) == [path, damaged]
    else:
        assert checkpoints(tmp_path) == [damaged]


def test_a_flipped_bit_is_one_bit(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, 10)
    damage(path, "flipped bit", rng=Random(0), next_step=15)
    changed = {name: (path / name).read_bytes() for name, content in FILES.items() if (path / name).read_bytes() != content}
    ((name, content),) = changed.items()
    assert sum((a ^ b).bit_count() for a, b in zip(content, FILES[name], strict=True)) == 1


def test_only_final_names_are_checkpoints(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, 10)
    for name in (".step_00000015.partial", "step_00000015.damaged", "step_00000020.damaged-2"):
        path.with_name(name).mkdir()
    assert checkpoints(tmp_path) == [path]
