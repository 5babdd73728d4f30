"""A small shapes data set, made once for all tests of this folder; who damages it copies it first."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mmar_megatron.config import DataConfig
from mmar_megatron.data.codec import PatchCodec
from mmar_megatron.data.prepare import make_shapes

TRAIN, VALIDATION = 60, 22


@pytest.fixture(scope="session")
def shapes_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "shapes"
    make_shapes(out, codec=PatchCodec(image_size=32, patch_size=4), train=TRAIN, validation=VALIDATION, log=lambda _: None)
    return out


@pytest.fixture
def shapes_copy(shapes_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shapes_dir, tmp_path / "shapes"))


@pytest.fixture
def config(shapes_dir: Path) -> DataConfig:
    return DataConfig(path=str(shapes_dir), num_workers=0)
