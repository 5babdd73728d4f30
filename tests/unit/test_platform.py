"""What is done to megatron-core where there is no GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mmar_megatron import platform

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(platform.HAS_CUDA, reason="on a GPU megatron-core compiles its functions")
def test_a_process_starts_without_the_compiler() -> None:
    program = """
import sys
import mmar_megatron.training.trainer
from megatron.core.fusions.fused_bias_swiglu import swiglu
from megatron.core.jit import jit_fuser
print("torch._inductor.compile_fx" in sys.modules, swiglu.__closure__, jit_fuser(len) is len)
"""
    said = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    assert said.stdout.split() == ["False", "None", "True"]
