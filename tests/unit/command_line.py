"""A command line that says just enough, for the tests of the configuration."""

from __future__ import annotations

import functools

import pytest

from mmar_megatron import config as configuration
from mmar_megatron.config import CommandLine, parse_command_line

SIZES = [
    *("--model.backbone.num_layers", "4", "--model.backbone.hidden_size", "32", "--model.backbone.num_attention_heads", "4"),
    *("--train.global_batch_size", "8", "--train.micro_batch_size", "2"),
]
PP2 = ["--parallel.pipeline_model_parallel_size=2"]
TP2 = ["--parallel.tensor_model_parallel_size=2"]
INTERLEAVED = [*PP2, "--parallel.virtual_pipeline_model_parallel_size=2"]
FP8 = ["--model.backbone.transformer_impl=transformer_engine", "--precision.dtype=bf16"]
"""What `precision.fp8` asks for beside."""


def parse(*options: str) -> CommandLine:
    """The options, after the sizes that have no defaults."""
    return parse_command_line([*SIZES, *options])


def share_parser(patch: pytest.MonkeyPatch) -> None:
    """Build the parser once: it does not remember what it parsed, and takes as long to build as to use."""
    patch.setattr(configuration, "build_parser", functools.cache(configuration.build_parser))
