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
from mmar_megatron.model.selection import Selection


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


def image_batch(
    latents_BNC: Tensor, masked_BN: Tensor, *, tokens: Selection, first_B: Tensor, source: DataSource, multiple: int
) -> Batch:
    """Some tokens of one image a row, behind prompts; where there are more of these, the images begin again.

    Args:
        latents_BNC, masked_BN: of the images.
        tokens: which of them, in each row.
        first_B: position of the first token of each row's image.
        multiple: as for `prompt_batch`.
    """
    position_BA = first_B[:, None] + tokens.place_BA
    batch = continuation(
        torch.full_like(position_BA, source.tokenizer.image_id),
        position_ids_BS=position_BA,
        span_ids_BS=torch.zeros_like(position_BA),
        source=source,
        multiple=multiple,
    )
    # Copies: the caller goes on to fill in what is drawn.
    batch.latents_MNC, batch.masked_MN, batch.visible_MN = latents_BNC.clone(), masked_BN.clone(), ~masked_BN
    row_K, place_K, column_K = tokens.entries
    batch.image_positions_MN = torch.full((len(first_B), latents_BNC.shape[1]), -1, device=first_B.device)
    batch.image_positions_MN[row_K, place_K] = row_K * batch.tokens_BS.shape[1] + column_K
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
        image_positions_MN=torch.full_like(none_MN, -1, dtype=torch.int64),
        visible_MN=none_MN,
        masked_MN=none_MN,
        timesteps_MNR=torch.zeros((1, num_tokens, 1), device=tokens_BS.device),
        noise_MNRC=torch.zeros((1, num_tokens, 1, channels), device=tokens_BS.device),
        sample_ids_BK=torch.full((rows, 1), -1, device=tokens_BS.device),
        labelled_L=tokens_BS.new_empty(0),
        masked_P=tokens_BS.new_empty(0),
        aligned_V=tokens_BS.new_empty(0),
    )


def _rounded(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple
