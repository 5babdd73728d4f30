from __future__ import annotations

from pathlib import Path

import pytest

from mmar_megatron.parallel import ParallelGroups
from tests.unit.inference.scene import Scene, build_scene


@pytest.fixture(scope="module")
def scene(coarse_shapes_dir: Path, groups: ParallelGroups) -> Scene:
    return build_scene(coarse_shapes_dir, groups)
