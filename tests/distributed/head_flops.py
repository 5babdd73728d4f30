"""What the diffusion head and PostProjector cost each tensor-parallel rank, for masks that are unkind to a division by place."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mmar_megatron.data.batch import Batch
from mmar_megatron.data.tokenizer import Tokenizer
from mmar_megatron.model.losses import LossSums
from mmar_megatron.model.mmar_model import MMARModel
from mmar_megatron.parallel import ParallelGroups
from tests.unit.tiny import Documents

MASKS: dict[str, list[Iterable[int]]] = {
    "odd places": [*[range(1, 16, 2)] * 20, [3]],
    "first rows": [*[range(16)] * 10, [0], *[()] * 10],
    "ends of images": [range(9, 16)] * 23,
    "few and many": [*[range(15)] * 9, *[[number] for number in range(16)], range(10)],
}
"""The masked tokens of each row's image; a row without any tells of its image. In all 161 tokens: 2 and 4 leave a remainder."""


def head_flops(model: MMARModel, *, tokenizer: Tokenizer, groups: ParallelGroups) -> dict[str, dict[str, list[int]]]:
    """FLOPs, forward and backward, by mask and module, on each tensor-parallel rank."""
    return {name: _of_batch(model, _batch(masks, tokenizer=tokenizer), groups=groups) for name, masks in MASKS.items()}


def _batch(masks: list[Iterable[int]], *, tokenizer: Tokenizer) -> Batch:
    documents, rows = Documents(tokenizer), []
    for number, masked in enumerate(masks):
        text = [5] * (1 + number % 7)  # images stand at different places
        document = (
            documents.text_to_image(text, masked=list(masked), seed=number)
            if list(masked)
            else documents.image_to_text(text, seed=number)
        )
        rows.append([document])
    return documents.batch(rows, sequence_length=48)


def _of_batch(model: MMARModel, batch: Batch, *, groups: ParallelGroups) -> dict[str, list[int]]:
    modules: dict[str, nn.Module] = {"head": model.diffusion_head, "PostProjector": model.post_projector}
    inputs: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def keep(name: str) -> Any:
        return lambda module, arguments, named: inputs.__setitem__(name, (arguments, named))

    hooks = [module.register_forward_pre_hook(keep(name), with_kwargs=True) for name, module in modules.items()]
    assert isinstance(model(batch), LossSums)
    for hook in hooks:
        hook.remove()

    found: dict[str, list[int]] = {}
    for name, module in modules.items():
        arguments, named = inputs[name]
        found[name] = [0] * groups.tensor.size()
        flops = _counted(module, [*map(_alone, arguments)], {key: _alone(value) for key, value in named.items()})
        torch.distributed.all_gather_object(found[name], flops, group=groups.tensor)
    return found


def _alone(tensor: Tensor) -> Tensor:
    """Cut off from the backbone, whose operations are not to be counted."""
    return tensor.detach().requires_grad_(tensor.requires_grad)


def _counted(module: nn.Module, arguments: list[Tensor], named: dict[str, Tensor]) -> int:
    with FlopCounterMode(display=False) as counter:
        module(*arguments, **named).sum().backward()
    return counter.get_total_flops()
