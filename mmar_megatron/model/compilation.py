"""The diffusion head, compiled."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

_MOST_SHAPES = 64
"""Numbers of rows that are compiled for; torch would give up after 8."""


def compile_in_training(module: nn.Module, *, fixed_rows: bool, graphs: bool) -> None:
    """Have the module run compiled while it trains: at its first call, which then takes a minute.

    Painting and captioning come with ever other numbers of rows, and run it as it is. Where the compiler meets what it cannot
    compile, it says so: it never falls back.

    Args:
        module: keeps its parameters, their names, and its hooks, which run around what is compiled.
        fixed_rows: compile anew for each number of rows, of which there are few; else once, for any.
        graphs: launch all kernels of a pass at once, by a CUDA graph.
    """
    plain = module.forward
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_SHAPES)
    mode = "reduce-overhead" if graphs else None
    compiled = torch.compile(plain, dynamic=not fixed_rows, fullgraph=True, mode=mode)
    module.forward = partial(_forward, module, plain, compiled)


def _forward(module: nn.Module, plain: Any, compiled: Any, *args: Any, **options: Any) -> Any:
    return (compiled if module.training else plain)(*args, **options)
