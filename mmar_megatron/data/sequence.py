"""Sequences: text and image tokens in the order in which the model reads them.

    text to image   <bos> text <begin_image> image * N <end_image> <eos>    the masked image tokens are learned
    image only      <bos>      <begin_image> image * N <end_image> <eos>    the masked image tokens are learned
    image to text   <bos> <begin_image> image * N <end_image> text <eos>    the text and <eos> are learned; nothing is masked

A `Document` is one such sequence. `assemble` lays documents one after another into rows of fixed length; today's loader puts one
into each row. Axes: B rows, S positions, M image slots, N tokens of an image, C channels, R noise levels, L tokens of a document.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from mmar_megatron.data.batch import IGNORE, Batch
from mmar_megatron.data.tokenizer import Tokenizer


@dataclass(kw_only=True)
class DocumentImage:
    """The image of a document: what is seen of it, what is to be predicted, and the noise for that."""

    latents_NC: NDArray[np.float32]
    masked_N: NDArray[np.bool_]
    """All others are visible."""
    timesteps_NR: NDArray[np.float32] | None = None
    """In [0, 1); none where nothing is masked."""
    noise_NRC: NDArray[np.float32] | None = None
    """Standard normal; none where nothing is masked."""


@dataclass(kw_only=True)
class Document:
    """One sequence with one image."""

    sample_id: int
    tokens_L: list[int]
    labels_L: list[int]
    image_start: int
    """Position of the first image token."""
    image: DocumentImage


class DocumentBuilder:
    """Makes documents of at most `sequence_length` positions.

    Args:
        tokenizer: for the special tokens.
        num_tokens: of an image, N.
        sequence_length: of a row, S.

    Raises:
        ValueError: an image with its special tokens does not leave room for one token of text.
    """

    def __init__(self, tokenizer: Tokenizer, *, num_tokens: int, sequence_length: int) -> None:
        # <bos>, <begin_image>, <end_image>, <eos>
        self.max_text = sequence_length - num_tokens - 4
        if self.max_text < 1:
            raise ValueError(
                f"sequence_length {sequence_length} has no room for {num_tokens} image tokens, 4 special tokens and text: "
                f"set data.sequence_length to {num_tokens + 5} at the very least"
            )
        self._tokenizer = tokenizer
        self._image = [tokenizer.begin_image_id, *[tokenizer.image_id] * num_tokens, tokenizer.end_image_id]

    def text_to_image(self, text: list[int], *, image: DocumentImage, sample_id: int) -> Document:
        """Text, then the image to be painted; without text it is the `image only` sequence. Too long text loses its end."""
        prompt = [self._tokenizer.bos_id, *text[: self.max_text]]
        tokens = [*prompt, *self._image, self._tokenizer.eos_id]
        labels = [IGNORE] * len(tokens)
        return Document(sample_id=sample_id, tokens_L=tokens, labels_L=labels, image_start=len(prompt) + 1, image=image)

    def image_to_text(self, text: list[int], *, image: DocumentImage, sample_id: int) -> Document:
        """The image, then the text to be learned: <end_image> predicts its first token, its last token <eos>.

        Too long text loses its end, and then ends without <eos>: the model shall not learn to stop in mid-sentence.
        """
        prompt = [self._tokenizer.bos_id, *self._image]
        ending = [self._tokenizer.eos_id] if len(text) <= self.max_text else []
        answer = [*text[: self.max_text], *ending]
        tokens = [*prompt, *answer]
        labels = [IGNORE] * (len(prompt) - 1) + answer + [IGNORE]
        return Document(sample_id=sample_id, tokens_L=tokens, labels_L=labels, image_start=2, image=image)


def assemble(
    rows: Sequence[Sequence[Document]],
    *,
    sequence_length: int,
    images_per_row: int = 1,
    image_shape: tuple[int, int],
    timestep_multiplier: int,
    pad_id: int,
) -> Batch:
    """Documents -> a `Batch` with B = len(rows) and M = B * images_per_row slots. A row may be empty: then it teaches nothing.

    Args:
        rows: the documents of each row, which together fit into it.
        image_shape: (N, C).
        timestep_multiplier: R.
        pad_id: fills what is left of a row.
    """
    num_rows, num_slots = len(rows), len(rows) * images_per_row
    num_tokens, channels = image_shape
    tokens_BS = np.full((num_rows, sequence_length), pad_id, dtype=np.int64)
    labels_BS = np.full_like(tokens_BS, IGNORE)
    position_ids_BS = np.zeros_like(tokens_BS)
    document_ids_BS = np.full_like(tokens_BS, -1)
    span_ids_BS = np.full_like(tokens_BS, -1)
    latents_MNC = np.zeros((num_slots, num_tokens, channels), dtype=np.float32)
    image_positions_MN = np.zeros((num_slots, num_tokens), dtype=np.int64)
    visible_MN = np.zeros((num_slots, num_tokens), dtype=np.bool_)
    masked_MN = np.zeros_like(visible_MN)
    timesteps_MNR = np.zeros((num_slots, num_tokens, timestep_multiplier), dtype=np.float32)
    noise_MNRC = np.zeros((num_slots, num_tokens, timestep_multiplier, channels), dtype=np.float32)

    for b, documents in enumerate(rows):
        start = 0
        for d, document in enumerate(documents):
            end = start + len(document.tokens_L)
            tokens_BS[b, start:end] = document.tokens_L
            labels_BS[b, start:end] = document.labels_L
            position_ids_BS[b, start:end] = np.arange(end - start)
            document_ids_BS[b, start:end] = d

            m, image, image_start = b * images_per_row + d, document.image, start + document.image_start
            span_ids_BS[b, image_start : image_start + num_tokens] = d
            image_positions_MN[m] = b * sequence_length + image_start + np.arange(num_tokens)
            latents_MNC[m] = image.latents_NC
            masked_MN[m] = image.masked_N
            visible_MN[m] = ~image.masked_N
            if image.timesteps_NR is not None and image.noise_NRC is not None:
                timesteps_MNR[m] = image.timesteps_NR
                noise_MNRC[m] = image.noise_NRC
            start = end

    return Batch(
        tokens_BS=torch.from_numpy(tokens_BS),
        labels_BS=torch.from_numpy(labels_BS),
        position_ids_BS=torch.from_numpy(position_ids_BS),
        document_ids_BS=torch.from_numpy(document_ids_BS),
        span_ids_BS=torch.from_numpy(span_ids_BS),
        latents_MNC=torch.from_numpy(latents_MNC),
        image_positions_MN=torch.from_numpy(image_positions_MN),
        visible_MN=torch.from_numpy(visible_MN),
        masked_MN=torch.from_numpy(masked_MN),
        timesteps_MNR=torch.from_numpy(timesteps_MNR),
        noise_MNRC=torch.from_numpy(noise_MNRC),
        sample_ids_B=torch.tensor([row[0].sample_id if row else -1 for row in rows]),
    )
