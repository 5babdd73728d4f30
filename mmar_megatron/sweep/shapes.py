"""Shapes of models, as options of the configuration."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mmar_megatron.sweep.spec import FamilySpec, Spec

Options = Mapping[str, Any]
"""Nested, as in a configuration file."""

_MULTIPLE = 32
"""Of feed-forward sizes and widths of the diffusion head."""


@dataclass(frozen=True)
class Shape:
    """A size of the model."""

    name: str
    options: Options


def shapes_of(spec: Spec) -> list[Shape]:
    """All shapes of a specification.

    Raises:
        ValueError: a width that the rule cannot have, or a name that cannot be one of a directory.
    """
    if spec.family is not None:
        return [_of_family(spec.family, width=width) for width in sorted(set(spec.family.widths))]
    for each in spec.shapes:
        if not re.fullmatch(r"[\w.-]+", each.name):
            raise ValueError(f"the shape's name {each.name!r} becomes that of a directory: use letters, digits, - _ and . alone")
    return [Shape(each.name, each.options) for each in spec.shapes]


def _of_family(family: FamilySpec, *, width: int) -> Shape:
    heads, odd_heads = divmod(width, family.head_size)
    groups, odd_groups = divmod(heads, family.heads_per_group)
    if odd_heads:
        raise ValueError(f"the width {width} is not a multiple of family.head_size {family.head_size}: change one of them")
    if odd_groups:
        raise ValueError(
            f"width {width} has {heads} heads, which do not divide by family.heads_per_group {family.heads_per_group}"
        )
    layers = max(1, round(width / family.width_per_layer))
    model: dict[str, Any] = {
        "backbone": {
            "num_layers": layers,
            "hidden_size": width,
            "num_attention_heads": heads,
            "num_query_groups": groups,
            "ffn_hidden_size": _MULTIPLE * math.ceil(family.ffn_ratio * width / _MULTIPLE - 1e-9),
        }
    }
    if family.vit_ratio:
        vit_heads = max(1, round(family.vit_ratio * width / family.head_size))
        model["embedding_vit"] = {"hidden_size": vit_heads * family.head_size, "num_attention_heads": vit_heads}
    if family.diffusion_head_ratio:
        model["head"] = {"width": _MULTIPLE * max(1, round(family.diffusion_head_ratio * width / _MULTIPLE))}
    return Shape(f"w{width}-l{layers}", {"model": model})


def initial_std(width: int) -> float:
    """Of weights, sqrt(2 / (5 width)): "small init" (Nguyen and Salazar, arXiv 1910.05895)."""
    return math.sqrt(2 / (5 * width))


def merged(*layers: Options) -> dict[str, Any]:
    """Nested options, of which later ones win."""
    result: dict[str, Any] = {}
    for options in layers:
        for key, value in options.items():
            inner = result.get(key)
            both = isinstance(value, Mapping) and isinstance(inner, Mapping)
            result[key] = merged(inner, value) if both and inner is not None else value
    return result
