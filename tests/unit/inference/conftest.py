from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmar_megatron.parallel import ParallelGroups
from tests.unit.inference.scene import Scene, build_scene


@pytest.fixture(scope="module")
def scene(coarse_shapes_dir: Path, groups: ParallelGroups) -> Scene:
    return build_scene(coarse_shapes_dir, groups)


@pytest.fixture(scope="module")
def shallow(coarse_shapes_dir: Path, groups: ParallelGroups) -> Scene:
    """With one layer, and features of visible tokens that do not depend on each other."""
    scene = build_scene(coarse_shapes_dir, groups, "--model.backbone.num_layers", "1")
    with torch.no_grad():
        for name, parameter in scene.model.named_parameters():
            if "embedding_vit.blocks" in name and (".proj." in name or ".fc2." in name):
                parameter.zero_()
    return scene
