"""Greedy captions: image to text, one token of every sequence at a time.

Pictures are read once; each further token runs the backbone over itself alone. Axes: B pictures, S positions, D width, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmar_megatron import platform
from mmar_megatron.data.batch import Batch
from mmar_megatron.data.sequence import DocumentImage
from mmar_megatron.data.source import DataSource
from mmar_megatron.engine.base import Engine
from mmar_megatron.inference.batches import continuation, prompt_batch
from mmar_megatron.model.key_values import KeyValueCache
from mmar_megatron.parallel import ParallelGroups


def caption(
    engine: Engine, images_BHW3: Sequence[NDArray[np.uint8]], *, source: DataSource, groups: ParallelGroups, max_tokens: int
) -> list[str]:
    """The most likely word after word for each picture.

    All ranks of a model replica call it together, within `engine.evaluating()`.

    Args:
        images_BHW3: uint8 pixels.
        max_tokens: longest caption.
    """
    latents = [source.codec.encode(image) for image in images_BHW3]
    images = [DocumentImage(latents_NC=x, masked_N=np.zeros(len(x), dtype=np.bool_)) for x in latents]
    documents = [source.builder.content([image], sample_id=0) for image in images]
    multiple = groups.tensor.size()
    batch, last = prompt_batch(documents, source=source, multiple=multiple), len(documents[0].tokens_L) - 1
    cache, position = KeyValueCache(), len(documents[0].tokens_L)
    texts: list[list[int]] = [[] for _ in images]
    ended = [False] * len(texts)
    for _ in range(min(max_tokens, source.builder.max_text)):
        next_B = _most_likely(engine, batch, last=last, cache=cache, source=source, groups=groups)
        cache.commit(batch.document_ids_BS >= 0)
        for b, token in enumerate(next_B.tolist()):
            ended[b] = ended[b] or token == source.tokenizer.eos_id
            if not ended[b]:
                texts[b].append(token)
        if all(ended):
            break
        position_B1 = torch.full_like(next_B, position)[:, None]
        batch, last = continuation(next_B[:, None], position_ids_BS=position_B1, source=source, multiple=multiple), 0
        position += 1
    return [source.tokenizer.decode(text) for text in texts]


def _most_likely(
    engine: Engine, batch: Batch, *, last: int, cache: KeyValueCache, source: DataSource, groups: ParallelGroups
) -> Tensor:
    """The most likely token behind position `last` of each row, [B], alike on all ranks."""
    h_SBD = engine.hidden_states(batch, cache=cache)
    next_B = torch.empty(len(batch.tokens_BS), dtype=torch.int64, device=platform.device())
    if h_SBD is not None:
        model = engine.last_stage
        assert model is not None
        next_B = model.text_logits(h_SBD[last])[:, : source.tokenizer.vocab_size].argmax(dim=-1)
    if groups.pipeline.size() > 1:
        torch.distributed.broadcast(next_B, group=groups.pipeline, group_src=groups.pipeline.size() - 1)
    return next_B
