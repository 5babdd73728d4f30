"""What needs a GPU: skipped, and said so, where there is none. Start it there by `python -m pytest tests/gpu`."""

from __future__ import annotations

import pytest

from mmar_megatron import platform
from tests.unit.conftest import coarse_shapes_dir, coarse_tokenizer, environment, groups  # noqa: F401


@pytest.fixture(scope="session", autouse=True)
def gpu() -> None:
    if not platform.HAS_CUDA:
        pytest.skip("needs a GPU")
