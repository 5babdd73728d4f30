"""A real process group of one process, and small data with large patches, for the tests of model, engine and inference."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmar_megatron import parallel, platform
from mmar_megatron.config import ParallelConfig
from mmar_megatron.data.tokenizer import Tokenizer, load_tokenizer
from mmar_megatron.parallel import ParallelGroups
from tests.distributed.common import make_data


@pytest.fixture(scope="session")
def coarse_shapes_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of 4 x 4 tokens, as the tiny model of `tests.distributed.common` reads them."""
    return make_data(tmp_path_factory.mktemp("coarse") / "shapes")


@pytest.fixture(scope="session")
def coarse_tokenizer(coarse_shapes_dir: Path) -> Tokenizer:
    return load_tokenizer(coarse_shapes_dir)


@pytest.fixture(scope="module", autouse=True)
def environment() -> Iterator[None]:
    """A process that joins its group says in its environment where to meet; what other modules start must not go there."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def groups(environment: None) -> Iterator[ParallelGroups]:
    """Of a whole module and no longer: other modules make groups of their own."""
    groups = parallel.initialize(ParallelConfig())
    platform.seed_everything(0, tensor_rank=0)
    yield groups
    parallel.leave()
