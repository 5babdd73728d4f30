"""A training step on rows of one text each, which are attended to in causal order, and the same step under the mixed mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from mmar_megatron import platform
from mmar_megatron.benchmarks.synthetic import sized
from mmar_megatron.benchmarks.timing import in_turn, median, ratio
from mmar_megatron.data.batch import IGNORE, Batch
from mmar_megatron.data.sequence import Document, assemble
from mmar_megatron.engine.native import NativeEngine
from mmar_megatron.model.image_geometry import ImageGeometry
from mmar_megatron.model.mmar_model import build_model

_VOCABULARY = 128


def compare_causal(options: Sequence[str], *, lengths: Sequence[int], positions: int, rounds: int) -> dict[str, Any]:
    """Seconds of a step on texts without a mask and with it, their ratio, and how far the two losses are apart.

    Args:
        options: of pretrain_mmar.py; data are made up.
        lengths: S, one after the other.
        positions: of all rows together, as near as whole rows come; at least one.
        rounds: of which medians are taken.

    Raises:
        ValueError: there are several processes.
    """
    config, groups = sized(options)
    (model,) = build_model(
        config.model,
        geometry=ImageGeometry(grid_height=1, grid_width=1, channels=1),
        vocab_size=_VOCABULARY,
        groups=groups,
        seed=config.seed,
    )
    engine = NativeEngine(config, chunks=[model], groups=groups)

    def step(batch: Batch) -> float:
        return engine.train_step([batch], learning_rate=0.0).loss

    rows = []
    for length in lengths:
        batch = text_batch(rows=max(1, positions // length), length=length, seed=config.seed)
        batches = (replace(batch, causal=False), batch)
        masked_loss, causal_loss = map(step, batches)
        masked_s, causal_s = in_turn([partial(step, each) for each in batches], rounds=rounds)
        rows.append(
            {
                "length": length,
                "sequences": len(batch.tokens_BS),
                "masked_step_s": median(masked_s),
                "causal_step_s": median(causal_s),
                **ratio(causal_s, masked_s),
                "relative_loss_difference": abs(causal_loss / masked_loss - 1),
            }
        )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"parameters": parameters, "dtype": config.precision.dtype, "rows": rows}


def text_batch(*, rows: int, length: int, seed: int) -> Batch:
    """Rows of one text each, of this length, that is learned; on this device."""
    generator = np.random.default_rng(seed)

    def document() -> Document:
        tokens = generator.integers(_VOCABULARY, size=length).tolist()
        return Document(sample_id=0, tokens_L=tokens, labels_L=[*tokens[1:], IGNORE])

    return assemble(
        [[document()] for _ in range(rows)], sequence_length=length, image_shape=(1, 1), timestep_multiplier=1, pad_id=0
    ).to(platform.device())
