"""What one step of each shape costs: by the plan of a run, as `--dry_run` prints it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from mmar_megatron.config import Config, parse_command_line
from mmar_megatron.scaling.expected import RowMeans
from mmar_megatron.scaling.plan import Plan
from mmar_megatron.sweep.shapes import Options, Shape, initial_std, merged
from mmar_megatron.sweep.spec import Spec
from mmar_megatron.training.building import open_data
from mmar_megatron.training.planning import plan_run

_RESERVED = ("run_dir", "resume", "seed", "train.steps", "optimizer.lr", "optimizer.warmup_steps", "checkpoint.init_from")
"""What the sweep sets, and options of a specification may not."""

_CADENCE = {"validation": {"every": 1}, "checkpoint": {"every": 1}}
"""In place of the configuration files', as in every run."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A shape, and what a step of it costs."""

    shape: Shape
    options: Options
    """All that a run of this shape has beside the configuration files and what depends on its length."""
    width: int
    n_params: int
    step_flops: int
    """Expected, over all devices, with recomputation."""
    step_tokens: int
    step_epochs: float
    """Of the source that is read most often."""

    def tokens_per_parameter(self, budget: float) -> float:
        """After as many steps as the budget pays."""
        return budget / self.step_flops * self.step_tokens / self.n_params


def measure(spec: Spec, shapes: Sequence[Shape], *, say: Callable[[str], None]) -> list[Measured]:
    """All shapes, smallest first. Weights are built on the meta device; of the data the index alone is read.

    Raises:
        ValueError: options that contradict each other, or that the sweep must set, or shapes that would read other data.
    """
    for name, options in [("options", spec.options), *((f"the shape {shape.name}", shape.options) for shape in shapes)]:
        if taken := next((option for option in _RESERVED if _has(options, option)), None):
            raise ValueError(f"{name} may not have {taken}, which the sweep sets for each run: leave it out")
    measured: list[Measured] = []
    rows: RowMeans | None = None
    data = None
    for shape in shapes:
        options, config = _configured(spec, shape)
        data = data or config.data
        if config.data != data:
            raise ValueError(f"the shape {shape.name} changes `data`, but all runs must read the same: leave that out")
        if config.checkpoint.every == 0 or config.validation.every == 0:
            raise ValueError(
                f"the shape {shape.name} has checkpoint.every or validation.every 0, but a run must resume, and have a loss: "
                "leave that out"
            )
        source = open_data(config)
        rows = rows or RowMeans.of(source, seed=spec.seeds[0])
        planned = plan_run(config, source=source, world_size=spec.processes, rows=rows)
        measured.append(_measured(shape, options, planned, config))
        say(f"{shape.name}: {measured[-1].n_params:,} parameters, {measured[-1].step_flops:.3e} FLOPs a step")
    measured.sort(key=lambda each: each.n_params)
    for one, other in pairwise(measured):
        if one.n_params == other.n_params:
            raise ValueError(f"{one.shape.name} and {other.shape.name} have as many parameters: take one of them out")
    return measured


def _configured(spec: Spec, shape: Shape) -> tuple[Options, Config]:
    """The shape's options, and what they come to over the configuration files."""
    options = merged(spec.options, shape.options)
    with tempfile.TemporaryDirectory() as folder:

        def parsed(values: Options) -> Config:
            file = Path(folder, "shape.yaml")
            file.write_text(yaml.safe_dump(values))
            return parse_command_line([word for each in (*spec.configs, str(file)) for word in ("--config", each)]).config

        config = parsed(merged(_CADENCE, options))
        if _has(options, "model.backbone.init_method_std"):
            return options, config
        std = round(initial_std(config.model.backbone.hidden_size), 6)
        return merged({"model": {"backbone": {"init_method_std": std}}}, options), config


def _measured(shape: Shape, options: Options, planned: Plan, config: Config) -> Measured:
    return Measured(
        shape=shape,
        options=options,
        width=config.model.backbone.hidden_size,
        n_params=sum(planned.parameters.values()),
        step_flops=planned.flops.executed,
        step_tokens=planned.tokens,
        step_epochs=planned.counts.sequences * max(planned.rows.epochs.values(), default=0.0),
    )


def _has(options: Options, dotted: str) -> bool:
    values: Any = options
    for key in dotted.split("."):
        if not isinstance(values, dict) or key not in values:
            return False
        values = values[key]
    return True
