"""What a sweep is asked for: `SPEC.yaml`, typed and checked."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, set_parsing_settings

set_parsing_settings(docstring_parse_attribute_docstrings=True)


@dataclass(kw_only=True)
class FamilySpec:
    """Shapes by a rule: one for each width, all other sizes in proportion."""

    widths: list[int]
    """Hidden sizes of the backbone."""
    head_size: int = 64
    """Channels of an attention head; there are width / head_size heads, in EmbeddingViT too."""
    heads_per_group: int = 1
    """Query heads that share keys and values."""
    width_per_layer: float = 64.0
    """The backbone has width / this layers, rounded."""
    ffn_ratio: float = 8 / 3
    """Of the feed-forward size to the width, rounded up to a multiple of 32."""
    vit_ratio: float = 0.0
    """Of EmbeddingViT's width to the backbone's, rounded to whole heads; 0: as the configuration has it."""
    diffusion_head_ratio: float = 0.0
    """Of the diffusion head's width to the backbone's, rounded to a multiple of 32; 0: as the configuration has it."""


@dataclass(kw_only=True)
class ShapeSpec:
    """One shape by hand."""

    name: str
    options: dict[str, Any]
    """As a configuration file has them: sizes, and what this size needs beside (layout, micro-batch size)."""


@dataclass(kw_only=True)
class LearningRateSpec:
    """Peak learning rate `value` at `width`, times (width of the shape / `width`) ^ `exponent`."""

    value: float
    width: int
    exponent: float = -1.0
    """-1 is muP's rule for the matrices between hidden layers under Adam (Yang et al., arXiv 2203.03466, table 3)."""


@dataclass(kw_only=True)
class Spec:
    """A sweep."""

    configs: list[str]
    """Configuration files that all runs begin with, as `--config` of pretrain_mmar.py; relative to where it is started."""
    budgets: list[float]
    """FLOPs of a run, recomputation included."""
    learning_rate: LearningRateSpec
    family: FamilySpec | None = None
    """Shapes by a rule; either this or `shapes`."""
    shapes: list[ShapeSpec] = field(default_factory=list)
    sizes_per_budget: int = 6
    spread: float = 3.0
    """A budget's sizes lie between the expected optimum divided by this and times this, as far as there are shapes."""
    tokens_per_parameter: float = 20.0
    """Where the optimum is expected (Hoffmann et al., arXiv 2203.15556)."""
    seeds: list[int] = field(default_factory=lambda: [1234])
    """Every size of every budget is trained once with each."""
    warmup: float = 0.05
    """Share of a run's steps in which the learning rate rises."""
    validations: int = 4
    """In a run; the last one after its last step."""
    checkpoints: int = 4
    """In a run; the last one after its last step."""
    min_steps: int = 50
    """A run of fewer is refused."""
    max_epochs: float = 4.0
    """A run that reads a source more often is marked: up to four are about as good as fresh data (arXiv 2305.16264)."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further options of all runs, as a configuration file has them."""
    processes: int = 1
    """Of each run."""
    launch: str = ""
    """What pretrain_mmar.py is started by, in shell words; none: python, or torchrun where there are several processes."""
    retries: int = 2
    """A run that fails is started so many times more; any step further, and they are counted anew."""
    slurm: list[str] = field(default_factory=list)
    """Options of sbatch, such as --time=24:00:00."""
    setup: list[str] = field(default_factory=list)
    """Lines of shell before a run under SLURM."""


class _Parser(ArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise ValueError(" ".join(message.split()))


def read_spec(path: Path) -> Spec:
    """The specification in a YAML file.

    Raises:
        ValueError: an unknown key, a value of the wrong type or out of range, or neither or both of `family` and `shapes`.
        OSError: the file cannot be read.
    """
    with path.open():  # says what is wrong with the file better than the parser does
        pass
    parser = _Parser()
    parser.add_class_arguments(Spec)
    try:
        values = parser.instantiate(parser.parse_path(path))
        spec = Spec(**{f.name: values[f.name] for f in fields(Spec)})
        _check(spec)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return spec


def _check(spec: Spec) -> None:
    above_0 = {
        "sizes_per_budget": spec.sizes_per_budget,
        "tokens_per_parameter": spec.tokens_per_parameter,
        "learning_rate.value": spec.learning_rate.value,
        "learning_rate.width": spec.learning_rate.width,
        "min_steps": spec.min_steps,
        "validations": spec.validations,
        "checkpoints": spec.checkpoints,
        "processes": spec.processes,
        "the smallest of budgets": min(spec.budgets, default=0.0),
    }
    if spec.family is not None:
        above_0 |= {"family.head_size": spec.family.head_size, "family.heads_per_group": spec.family.heads_per_group}
        above_0 |= {"family.width_per_layer": spec.family.width_per_layer, "family.ffn_ratio": spec.family.ffn_ratio}
        above_0 |= {"the smallest of family.widths": min(spec.family.widths, default=0)}
    for name, value in above_0.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}: it must be above 0")
    if not spec.spread > 1:
        raise ValueError(f"spread is {spec.spread}: it must be above 1")
    if not 0 <= spec.warmup < 1:
        raise ValueError(f"warmup is {spec.warmup}: it is a share of the steps, below 1")
    if odd := [option for option in spec.slurm if not option.startswith("--")]:
        raise ValueError(f"slurm has {odd[0]!r}, which is not a long option of sbatch such as --time=24:00:00")
    if spec.retries < 0:
        raise ValueError(f"retries is {spec.retries}: it must not be negative")
    if (spec.family is None) == (not spec.shapes):
        raise ValueError("give either `family`, for shapes by a rule, or `shapes`, a list of them")
    names = {"budgets": [f"{budget:g}" for budget in spec.budgets], "shapes": [each.name for each in spec.shapes]}
    for name, given in {**names, "seeds": list(map(str, spec.seeds))}.items():
        if len(set(given)) < len(given):
            raise ValueError(f"`{name}` has something twice: take it out")
    if not spec.seeds:
        raise ValueError("seeds is empty: give at least one")
