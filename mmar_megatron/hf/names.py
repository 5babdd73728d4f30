"""Names of tensors: those of a checkpoint and those of a Hugging Face model, in one table that is read in both directions.

A checkpoint's names are those of any layer spec (see `layer_specs.py`), with the layers of the backbone stacked along a first
axis. Hugging Face's are Llama's, as Mistral and Qwen have them too, with the image parts beside them.

Axes: D width of the backbone, H heads, G key-value groups, P heads of a group, E width of a head, I width within the MLP.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor


class Layout(Enum):
    """How the Hugging Face tensors of a rule lie in the checkpoint's one."""

    SAME = "the one is the other"
    QUERY_KEY_VALUE = "one group after the other, in each its queries, its key, its value: [G (P + 2) E, ...]"
    CONCATENATED = "one behind the other along the first axis"


@dataclass(frozen=True)
class Rule:
    """A row of the table. `*` stands for any rest of a name that is the same on both sides, `{layer}` for a number."""

    ours: str
    theirs: tuple[str, ...]
    layout: Layout = Layout.SAME


_LAYER = "model.layers.{layer}."
_ATTENTION, _MLP = "decoder.layers.self_attention.", "decoder.layers.mlp."
_QUERY_KEY_VALUE = ("q_proj", "k_proj", "v_proj")
RULES = (
    Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",)),
    Rule("embedding.embedding_vit.*", ("model.embedding_vit.*",)),
    Rule("embedding.vis_projector.*", ("model.vis_projector.*",)),
    Rule("embedding.mask_embedding", ("model.mask_embedding",)),
    Rule("embedding.position.*", ("model.image_position.*",)),
    Rule(f"{_ATTENTION}linear_qkv.layer_norm_weight", (f"{_LAYER}input_layernorm.weight",)),
    Rule(
        f"{_ATTENTION}linear_qkv.weight",
        tuple(f"{_LAYER}self_attn.{name}.weight" for name in _QUERY_KEY_VALUE),
        Layout.QUERY_KEY_VALUE,
    ),
    Rule(
        f"{_ATTENTION}linear_qkv.bias",
        tuple(f"{_LAYER}self_attn.{name}.bias" for name in _QUERY_KEY_VALUE),
        Layout.QUERY_KEY_VALUE,
    ),
    Rule(f"{_ATTENTION}q_layernorm.weight", (f"{_LAYER}self_attn.q_norm.weight",)),
    Rule(f"{_ATTENTION}k_layernorm.weight", (f"{_LAYER}self_attn.k_norm.weight",)),
    Rule(f"{_ATTENTION}linear_proj.weight", (f"{_LAYER}self_attn.o_proj.weight",)),
    Rule(f"{_MLP}linear_fc1.layer_norm_weight", (f"{_LAYER}post_attention_layernorm.weight",)),
    Rule(
        f"{_MLP}linear_fc1.weight",
        (f"{_LAYER}mlp.gate_proj.weight", f"{_LAYER}mlp.up_proj.weight"),
        Layout.CONCATENATED,
    ),
    Rule(f"{_MLP}linear_fc2.weight", (f"{_LAYER}mlp.down_proj.weight",)),
    Rule("decoder.final_layernorm.weight", ("model.norm.weight",)),
    Rule("output_layer.weight", ("lm_head.weight",)),
    Rule("post_projector.*", ("post_projector.*",)),
    Rule("diffusion_head.*", ("diffusion_head.*",)),
    Rule("alignment_projector.*", ("alignment_projector.*",)),
)


@dataclass(frozen=True)
class Link:
    """One tensor of a checkpoint, of one layer where layers are stacked, and the Hugging Face tensors it consists of."""

    ours: str
    layer: int | None
    theirs: tuple[str, ...]
    layout: Layout


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Sizes that the layout of queries, keys and values follows from."""

    num_query_groups: int
    """G"""
    head_dim: int
    """E"""


def links(names: Iterable[str]) -> list[Link]:
    """The links of a Hugging Face model's tensors, in the order of their names; each name is in one of them.

    Raises:
        ValueError: a name is of no rule, or one that belongs to it is missing.
    """
    missing = dict.fromkeys(names)
    given = set(missing)
    found = []
    for name in list(missing):
        if name not in missing:
            continue
        link = _link(name)
        for part in link.theirs:
            if part not in given:
                raise ValueError(f"there is {name}, but no {part}")
            del missing[part]
        found.append(link)
    return found


def split(link: Link, tensor: Tensor, *, heads: Heads) -> dict[str, Tensor]:
    """A checkpoint's tensor -> Hugging Face's, contiguous."""
    match link.layout:
        case Layout.SAME:
            parts: tuple[Tensor, ...] = (tensor,)
        case Layout.CONCATENATED:
            parts = tensor.chunk(len(link.theirs))
        case Layout.QUERY_KEY_VALUE:
            groups = tensor.view(heads.num_query_groups, -1, heads.head_dim, *tensor.shape[1:])
            query, key, value = groups.tensor_split([-2, -1], dim=1)
            parts = tuple(part.flatten(0, 2) for part in (query, key, value))
    return {name: part.contiguous() for name, part in zip(link.theirs, parts, strict=True)}


def join(link: Link, tensors: Mapping[str, Tensor], *, heads: Heads) -> Tensor:
    """Undo of `split`."""
    parts = [tensors[name] for name in link.theirs]
    match link.layout:
        case Layout.SAME:
            return parts[0]
        case Layout.CONCATENATED:
            return torch.cat(parts)
        case Layout.QUERY_KEY_VALUE:
            groups = [part.view(heads.num_query_groups, -1, heads.head_dim, *part.shape[1:]) for part in parts]
            return torch.cat(groups, dim=1).flatten(0, 2)


def _link(name: str) -> Link:
    for rule in RULES:
        for pattern in rule.theirs:
            expression = re.escape(pattern).replace(r"\*", "(?P<rest>.+)").replace(r"\{layer\}", r"(?P<layer>\d+)")
            if match := re.fullmatch(expression, name):
                found = match.groupdict()
                rest, layer = found.get("rest", ""), found.get("layer")
                theirs = tuple(part.replace("*", rest).replace("{layer}", str(layer)) for part in rule.theirs)
                return Link(rule.ours.replace("*", rest), None if layer is None else int(layer), theirs, rule.layout)
    raise ValueError(f"the tensor {name} has no place in an MMAR model")
