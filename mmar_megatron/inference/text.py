"""Greedy captions: image to text, one token of every sequence at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from mmar_megatron import platform
from mmar_megatron.data.sequence import DocumentImage
from mmar_megatron.data.source import DataSource
from mmar_megatron.engine.base import Engine
from mmar_megatron.parallel import ParallelGroups


def caption(
    engine: Engine, images_BHW3: Sequence[NDArray[np.uint8]], *, source: DataSource, groups: ParallelGroups, max_tokens: int
) -> list[str]:
    """The most likely word after word for each picture.

    All ranks of a model replica call it together, within `engine.evaluating()`. Each token runs the backbone over all positions.

    Args:
        images_BHW3: uint8 pixels.
        max_tokens: longest caption.
    """
    latents = [source.codec.encode(image) for image in images_BHW3]
    texts: list[list[int]] = [[] for _ in latents]
    ended = [False] * len(texts)
    for _ in range(min(max_tokens, source.builder.max_text)):
        documents = [
            source.builder.image_to_text(
                text, image=DocumentImage(latents_NC=x, masked_N=np.zeros(len(x), dtype=np.bool_)), sample_id=0
            )
            for text, x in zip(texts, latents, strict=True)
        ]
        h_SBD = engine.hidden_states(
            source.assemble([[document] for document in documents], timestep_multiplier=1).to(platform.device())
        )
        next_B = torch.empty(len(texts), dtype=torch.int64, device=platform.device())
        if h_SBD is not None:
            model = engine.last_stage
            assert model is not None
            # The document ends in <eos>, which is not generated yet: what stands before it predicts the next token.
            last_B = torch.tensor([len(document.tokens_L) - 2 for document in documents], device=h_SBD.device)
            logits_BV = model.text_logits(h_SBD[last_B, torch.arange(len(texts), device=h_SBD.device)])
            next_B = logits_BV[:, : source.tokenizer.vocab_size].argmax(dim=-1)
        if groups.pipeline.size() > 1:
            torch.distributed.broadcast(next_B, group=groups.pipeline, group_src=groups.pipeline.size() - 1)
        for b, token in enumerate(next_B.tolist()):
            ended[b] = ended[b] or token == source.tokenizer.eos_id
            if not ended[b]:
                texts[b].append(token)
        if all(ended):
            break
    return [source.tokenizer.decode(text) for text in texts]
