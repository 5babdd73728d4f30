"""What the backbone is run on while it paints and writes: prompts once, then what follows them alone.

Axes: B rows, S positions of a pass, N tokens of an image, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mmar_megatron import platform
from mmar_megatron.data.batch import IGNORE, Batch
from mmar_megatron.data.sequence import Document, assemble
from mmar_megatron.data.source import DataSource


def prompt_batch(documents: Sequence[Document], *, source: DataSource, multiple: int) -> Batch:
    """One prompt a row, as long as the longest needs, on this device.

    Args:
        multiple: of which the length is one; sequence parallelism divides it over the tensor-parallel ranks.
    """
    longest = max(len(document.tokens_L) for document in documents)
    batch = assemble(
        [[document] for document in documents],
        sequence_length=_rounded(longest, multiple),
        image_shape=(source.codec.num_tokens, source.codec.channels),
        timestep_multiplier=1,
        pad_id=source.tokenizer.pad_id,
    )
    return batch.to(platform.device())


def image_batch(latents_BNC: Tensor, masked_BN: Tensor, *, first_B: Tensor, source: DataSource, multiple: int) -> Batch:
    """The tokens of one image a row, behind prompts.

    Args:
        latents_BNC, masked_BN: of the images.
        first_B: position of each image's first token.
        multiple: as for `prompt_batch`.
    """
    rows, num_tokens, _ = latents_BNC.shape
    place_N = torch.arange(num_tokens, device=latents_BNC.device)
    span_BN = torch.zeros((rows, num_tokens), dtype=torch.int64, device=latents_BNC.device)
    batch = continuation(
        torch.full_like(span_BN, source.tokenizer.image_id),
        position_ids_BS=first_B[:, None] + place_N,
        span_ids_BS=span_BN,
        source=source,
        multiple=multiple,
    )
    length = batch.tokens_BS.shape[1]
    batch.latents_MNC, batch.masked_MN, batch.visible_MN = latents_BNC, masked_BN, ~masked_BN
    batch.image_positions_MN = torch.arange(rows, device=place_N.device)[:, None] * length + place_N
    return batch


def continuation(
    tokens_BS: Tensor, *, position_ids_BS: Tensor, span_ids_BS: Tensor | None = None, source: DataSource, multiple: int
) -> Batch:
    """Rows of tokens behind prompts. What fills them up is of no document: it is neither seen nor sees anything."""
    rows, length = tokens_BS.shape
    filled = (0, _rounded(length, multiple) - length)
    spans_BS = torch.full_like(tokens_BS, -1) if span_ids_BS is None else span_ids_BS
    num_tokens, channels = source.codec.num_tokens, source.codec.channels
    tokens_BS = F.pad(tokens_BS, filled, value=source.tokenizer.pad_id)
    none_MN = torch.zeros((1, num_tokens), dtype=torch.bool, device=tokens_BS.device)
    return Batch(
        tokens_BS=tokens_BS,
        labels_BS=torch.full_like(tokens_BS, IGNORE),
        position_ids_BS=F.pad(position_ids_BS, filled),
        document_ids_BS=F.pad(torch.zeros_like(spans_BS), filled, value=-1),
        span_ids_BS=F.pad(spans_BS, filled, value=-1),
        latents_MNC=torch.zeros((1, num_tokens, channels), device=tokens_BS.device),
        image_positions_MN=torch.zeros_like(none_MN, dtype=torch.int64),
        visible_MN=none_MN,
        masked_MN=none_MN,
        timesteps_MNR=torch.zeros((1, num_tokens, 1), device=tokens_BS.device),
        noise_MNRC=torch.zeros((1, num_tokens, 1, channels), device=tokens_BS.device),
        sample_ids_BK=torch.full((rows, 1), -1, device=tokens_BS.device),
    )


def _rounded(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple
