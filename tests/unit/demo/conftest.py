"""The random model and picture of the tests of generation."""

from tests.unit.generation.conftest import opened, picture, run_dir

__all__ = ["opened", "picture", "run_dir"]
