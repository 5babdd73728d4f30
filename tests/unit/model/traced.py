"""torch.compile without a compiler, for a CPU: it traces and runs what it traced."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch


@contextmanager
def traced() -> Iterator[list[torch.fx.GraphModule]]:
    """The graphs that torch.compile makes within."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any, **options: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    limit = torch._dynamo.config.recompile_limit
    with mock.patch.object(torch, "compile", partial(torch.compile, backend=backend)):
        try:
            with torch._dynamo.config.patch(disable=False, recompile_limit=limit):
                yield graphs
        finally:
            torch._dynamo.reset()
