"""FlexAttention on a CPU, for tests: torch's own implementation that holds all scores, forward and backward."""

from __future__ import annotations

import pytest
from torch.nn.attention import flex_attention

from mmar_megatron.model import flex


def use_unfused_flex(patch: pytest.MonkeyPatch) -> None:
    """Put it in the place of the compiled kernels.

    torch refuses gradients on a CPU, where its compiler has no backward pass; the implementation without the compiler has one.
    """
    patch.setattr(flex, "_kernel", lambda: flex_attention.flex_attention)
    patch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    patch.setattr(flex_attention, "_validate_device", lambda query, key, value: None)
