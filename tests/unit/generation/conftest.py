"""A random model of pictures of 4 x 4 tokens, opened once for each module."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmar_megatron.generation.opening import Opened, open_model
from tests.unit.hf.checkpoints import make_checkpoint


@pytest.fixture(scope="session")
def run_dir(coarse_shapes_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("generation") / "run"
    make_checkpoint(directory, "--data.sequence_length", "96", data=coarse_shapes_dir)
    return directory


@pytest.fixture(scope="module")
def opened(run_dir: Path) -> Opened:
    return open_model(str(run_dir))


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """Random pixels, 48 x 32."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "start.png")
    return tmp_path / "start.png"
