"""What it is worth that head and logits are computed only where there is a loss: beside computing them everywhere and masking.

Suffixes: M images, N tokens of an image, D width of the backbone, T all positions, K masked tokens, L labelled positions, R noise
levels for each token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from mmar_megatron import platform
from mmar_megatron.benchmarks.synthetic import sized, stirred_model, synthetic_batch
from mmar_megatron.benchmarks.timing import in_turn, median, ratio
from mmar_megatron.config import MaskRatioConfig
from mmar_megatron.data.batch import IGNORE, Batch
from mmar_megatron.model.mmar_model import MMARModel, filled_up

STAGES = {"stage 1": MaskRatioConfig(), "uniform": MaskRatioConfig(distribution="uniform", minimum=0.0)}
"""How much of an image is masked: `MaskRatioConfig` says what stage 1 draws; stage 2 may draw anything."""
_NOT_RUN = ("--model.backbone.num_layers", "1")
"""The backbone is there, but its hidden states are given."""
_COMPILED: Mapping[str, Literal["kernels", "graphs"]] = {
    "masked, compiled": "kernels",
    "filled up, compiled": "kernels",
    "filled up, graphs": "graphs",
}
"""Heads that run on the masked tokens, or on a number of rows that is filled up, by their `model.head.compile`."""


def compare_head(
    options: Sequence[str],
    *,
    images: int,
    image_tokens: int,
    channels: int,
    rounds: int,
    compiled: bool = platform.HAS_CUDA,
) -> dict[str, Any]:
    """Seconds of the head's loss and backward pass (with PostProjector) on masked tokens, and on all with the loss masked.

    Compiled heads run on masked tokens: on any number of them, and on numbers filled up to eighths of all.

    Args:
        options: of pretrain_mmar.py; `model.head` has the sizes.
        images, image_tokens, channels: M, N and C.
        rounds: of which medians are taken.
        compiled: also compiled heads.
    """
    config, groups = sized([*options, *_NOT_RUN])
    heads = {"masked": config.model.head}
    for name, how in _COMPILED.items() if compiled else ():
        multiple = -(-images * image_tokens // 8) if name.startswith("filled up") else 1
        heads[name] = replace(config.model.head, compile=how, row_multiple=multiple)
    models = {
        name: stirred_model(replace(config, model=replace(config.model, head=head)), groups=groups, channels=channels)
        for name, head in heads.items()
    }
    model = models["masked"]
    rows = []
    for stage, mask_ratio in STAGES.items():
        batch = synthetic_batch(
            rows=images,
            text=1,
            image_tokens=image_tokens,
            channels=channels,
            levels=config.model.head.timestep_multiplier,
            mask_ratio=mask_ratio,
            seed=config.seed,
        )
        h_TD = _hidden_states(model, positions=images * image_tokens)
        masked = {name: partial(_head_on_masked, m, h_TD, batch=batch) for name, m in models.items()}
        share = batch.num_masked / len(h_TD)
        rows += _compared(partial(_head_everywhere, model, h_TD, batch=batch), masked, rounds=rounds, share=share, case=stage)
    skipped = {} if compiled else {"compiled": "torch.compile is measured on GPUs alone"}
    head = config.model.head
    sizes = {"depth": head.depth, "width": head.width, "timestep_multiplier": head.timestep_multiplier}
    return {**sizes, "tokens": images * image_tokens, "dtype": config.precision.dtype, "rows": rows, "skipped": skipped}


def compare_logits(
    options: Sequence[str], *, sequences: int, text: int, image_tokens: int, vocabulary: int, rounds: int
) -> dict[str, Any]:
    """Seconds of logits, cross-entropy and their backward pass at labelled positions, and at all with the loss masked.

    Args:
        options: of pretrain_mmar.py; `model.backbone.hidden_size` is the width.
        sequences: B; in each, all of the text is labelled.
        text, image_tokens: positions of a sequence.
        vocabulary: padded as the model pads it.
        rounds: of which medians are taken.
    """
    config, groups = sized([*options, *_NOT_RUN])
    model = stirred_model(config, groups=groups, vocab_size=vocabulary)
    batch = synthetic_batch(
        rows=sequences, text=text, image_tokens=image_tokens, mask_ratio=config.data.mask_ratio, seed=config.seed
    )
    labels_T = batch.labels_BS.flatten()
    h_TD = _hidden_states(model, positions=len(labels_T))
    rows = _compared(
        partial(_logits_everywhere, model, h_TD, labels_T=labels_T),
        {"labelled": partial(_logits_at_labels, model, h_TD, labels_T=labels_T)},
        rounds=rounds,
        share=batch.num_labels / len(labels_T),
        case="logits",
    )
    sizes = {"hidden_size": config.model.backbone.hidden_size, "vocabulary": vocabulary, "positions": len(labels_T)}
    return {**sizes, "labels": batch.num_labels, "dtype": config.precision.dtype, "rows": rows}


def _hidden_states(model: MMARModel, *, positions: int) -> Tensor:
    backbone = model.settings.backbone
    h_TD = torch.randn(positions, backbone.hidden_size, device=platform.device(), dtype=backbone.params_dtype)
    return h_TD.requires_grad_()


def _head_on_masked(model: MMARModel, h_TD: Tensor, *, batch: Batch) -> Tensor:
    masked_K, learned_K = filled_up(batch.masked_P, multiple=model.settings.head.row_multiple)
    error_KR, _ = model.image_errors(h_TD[masked_K], batch=batch, tokens_K=masked_K)
    return _learned((error_KR.mean(dim=1) * learned_K).sum() / batch.num_masked, model=model, h_TD=h_TD)


def _head_everywhere(model: MMARModel, h_TD: Tensor, *, batch: Batch) -> Tensor:
    error_TR, _ = model.image_errors(h_TD, batch=batch, tokens_K=torch.arange(len(h_TD), device=h_TD.device))
    loss = (error_TR.mean(dim=1) * batch.masked_MN.flatten()).sum() / batch.num_masked
    return _learned(loss, model=model, h_TD=h_TD)


def _logits_at_labels(model: MMARModel, h_TD: Tensor, *, labels_T: Tensor) -> Tensor:
    labelled_L = (labels_T != IGNORE).nonzero().squeeze(1)
    errors_L = model.text_errors(h_TD[labelled_L], labels_L=labels_T[labelled_L])
    return _learned(errors_L.mean(), model=model, h_TD=h_TD)


def _logits_everywhere(model: MMARModel, h_TD: Tensor, *, labels_T: Tensor) -> Tensor:
    labelled_T = labels_T != IGNORE
    errors_T = model.text_errors(h_TD, labels_L=labels_T.clamp(min=0))
    return _learned((errors_T * labelled_T).sum() / labelled_T.sum(), model=model, h_TD=h_TD)


def _learned(loss: Tensor, *, model: MMARModel, h_TD: Tensor) -> Tensor:
    model.zero_grad()
    h_TD.grad = None
    loss.backward()
    return loss.detach()


def _compared(
    everywhere: Callable[[], Tensor], chosen: Mapping[str, Callable[[], Tensor]], *, rounds: int, share: float, case: str
) -> list[dict[str, Any]]:
    """A row for each of the ways that leave out what has no loss, of which `share` is left."""
    loss = float(everywhere())
    differences = {name: abs(float(action()) / loss - 1) for name, action in chosen.items()}
    all_s, *of_chosen = in_turn([everywhere, *chosen.values()], rounds=rounds)
    found = []
    for (name, difference), seconds in zip(differences.items(), of_chosen, strict=True):
        faster = ratio(all_s, seconds)
        found.append(
            {
                "case": case,
                "rows": name,
                "share": round(share, 4),
                "seconds": median(seconds),
                "everywhere_s": median(all_s),
                **faster,
                "limit": round(1 / share, 4),
                "of_limit": round(faster["ratio"] * share, 4),
                "relative_loss_difference": difference,
            }
        )
    return found
