"""Sequences: text and image tokens in the order in which the model reads them.

    text to image   <bos> text <begin_image> image * N <end_image> <eos>    the masked image tokens are learned
    image only      <bos>      <begin_image> image * N <end_image> <eos>    the masked image tokens are learned
    image to text   <bos> <begin_image> image * N <end_image> text <eos>    the text and <eos> are learned; nothing is masked
    content         <bos> (text | <begin_image> image * N <end_image> | <eos>) ...    what its parts say

A `Document` is one such sequence. `assemble` lays documents one after another into rows of fixed length. Axes: B rows,
S positions, K documents of the row that has most, M images of all rows, N tokens of an image, C channels, R noise levels,
F teacher features, L tokens of a document.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from mmar_megatron.data.batch import IGNORE, Batch
from mmar_megatron.data.tokenizer import Tokenizer


@dataclass(kw_only=True)
class DocumentImage:
    """An image of a document: what is seen of it, what is to be predicted, and the noise for that."""

    latents_NC: NDArray[np.float32]
    masked_N: NDArray[np.bool_]
    """All others are visible."""
    timesteps_NR: NDArray[np.float32] | None = None
    """In [0, 1); none where nothing is masked."""
    noise_NRC: NDArray[np.float32] | None = None
    """Standard normal; none where nothing is masked."""
    teacher_NF: NDArray[np.float32] | None = None
    """Features of the alignment teacher, where they are asked for."""


class PlacedImage(NamedTuple):
    """An image, and the position of its first token in the document."""

    start: int
    image: DocumentImage


class Text(NamedTuple):
    """A part of a document."""

    tokens: list[int]
    learn: bool
    end: bool
    """<eos> follows, and is learned if the text is."""


@dataclass(kw_only=True)
class Document:
    """One sequence."""

    sample_id: int
    tokens_L: list[int] = field(default_factory=list)
    labels_L: list[int] = field(default_factory=list)
    images: list[PlacedImage] = field(default_factory=list)
    truncated: bool = False
    """It was too long, and lost its end."""

    @property
    def image_start(self) -> int:
        """Position of the first token of its last image."""
        return self.images[-1].start


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
        self.sequence_length, self.image_length = sequence_length, num_tokens + 2
        self._tokenizer = tokenizer
        self._image = [tokenizer.begin_image_id, *[tokenizer.image_id] * num_tokens, tokenizer.end_image_id]

    def text_to_image(self, text: list[int], *, image: DocumentImage, sample_id: int) -> Document:
        """Text, then the image to be painted; without text it is the `image only` sequence. Too long text loses its end."""
        document = self._begin(sample_id)
        self._add_text(document, text[: self.max_text], learn=False)
        self._add_image(document, image)
        self._add_text(document, [self._tokenizer.eos_id], learn=False)
        document.truncated = len(text) > self.max_text
        return document

    def image_to_text(self, text: list[int], *, image: DocumentImage, sample_id: int) -> Document:
        """The image, then the text to be learned: <end_image> predicts its first token, its last token <eos>.

        Too long text loses its end, and then ends without <eos>: the model shall not learn to stop in mid-sentence.
        """
        document = self._begin(sample_id)
        self._add_image(document, image)
        document.truncated = len(text) > self.max_text
        ending = [] if document.truncated else [self._tokenizer.eos_id]
        self._add_text(document, [*text[: self.max_text], *ending], learn=True)
        return document

    def content(self, parts: Sequence[Text | DocumentImage], *, sample_id: int) -> Document:
        """Texts and images in any order. Where they are too long, the end is lost: text in part, an image as a whole.

        An image to be painted stands last, and does not get lost: what stands before it gives way.
        """
        last = parts[-1] if parts else None
        painted = last if isinstance(last, DocumentImage) and last.masked_N.any() else None
        limit = self.sequence_length - (self.image_length if painted else 0)
        document = self._begin(sample_id)
        for part in parts[: len(parts) - (painted is not None)]:
            room = limit - len(document.tokens_L)
            if isinstance(part, DocumentImage):
                document.truncated = room < self.image_length
                if not document.truncated:
                    self._add_image(document, part)
            else:
                tokens = [*part.tokens, *([self._tokenizer.eos_id] if part.end else [])]
                document.truncated = len(tokens) > room
                self._add_text(document, tokens[:room], learn=part.learn)
            if document.truncated:
                break
        if painted:
            self._add_image(document, painted)
        return document

    def _begin(self, sample_id: int) -> Document:
        return Document(sample_id=sample_id, tokens_L=[self._tokenizer.bos_id], labels_L=[IGNORE])

    def _add_text(self, document: Document, tokens: list[int], *, learn: bool) -> None:
        if learn and tokens:
            document.labels_L[-1] = tokens[0]
            document.labels_L += [*tokens[1:], IGNORE]
        else:
            document.labels_L += [IGNORE] * len(tokens)
        document.tokens_L += tokens

    def _add_image(self, document: Document, image: DocumentImage) -> None:
        document.images.append(PlacedImage(len(document.tokens_L) + 1, image))
        self._add_text(document, self._image, learn=False)


def assemble(
    rows: Sequence[Sequence[Document]],
    *,
    sequence_length: int,
    image_shape: tuple[int, int],
    timestep_multiplier: int,
    teacher_features: int = 0,
    pad_id: int,
) -> Batch:
    """Documents -> a `Batch` with B = len(rows) and as many slots as there are images, but at least one.

    Args:
        rows: the documents of each row, which together fit into it. A row may be empty: then it teaches nothing.
        image_shape: (N, C).
        timestep_multiplier: R.
        teacher_features: F; 0: the batch has none.
        pad_id: fills what is left of a row.
    """
    num_rows, num_slots = len(rows), max(1, sum(len(document.images) for row in rows for document in row))
    num_tokens, channels = image_shape
    arrays: dict[str, NDArray[Any]] = {
        "tokens_BS": np.full((num_rows, sequence_length), pad_id),
        "labels_BS": np.full((num_rows, sequence_length), IGNORE),
        "position_ids_BS": np.zeros((num_rows, sequence_length), dtype=np.int64),
        "document_ids_BS": np.full((num_rows, sequence_length), -1),
        "span_ids_BS": np.full((num_rows, sequence_length), -1),
        "latents_MNC": np.zeros((num_slots, num_tokens, channels), dtype=np.float32),
        "image_positions_MN": np.full((num_slots, num_tokens), -1, dtype=np.int64),
        "visible_MN": np.zeros((num_slots, num_tokens), dtype=np.bool_),
        "masked_MN": np.zeros((num_slots, num_tokens), dtype=np.bool_),
        "timesteps_MNR": np.zeros((num_slots, num_tokens, timestep_multiplier), dtype=np.float32),
        "noise_MNRC": np.zeros((num_slots, num_tokens, timestep_multiplier, channels), dtype=np.float32),
        "sample_ids_BK": np.full((num_rows, max(map(len, rows), default=0)), -1),
    }
    if teacher_features:
        arrays["teacher_MNF"] = np.zeros((num_slots, num_tokens, teacher_features), dtype=np.float32)

    slot = 0
    for b, documents in enumerate(rows):
        start, first_of_row = 0, slot
        for d, document in enumerate(documents):
            here = (b, slice(start, start + len(document.tokens_L)))
            arrays["tokens_BS"][here] = document.tokens_L
            arrays["labels_BS"][here] = document.labels_L
            arrays["position_ids_BS"][here] = np.arange(len(document.tokens_L))
            arrays["document_ids_BS"][here] = d
            arrays["sample_ids_BK"][b, d] = document.sample_id
            for image_start, image in document.images:
                begin = start + image_start
                arrays["span_ids_BS"][b, begin : begin + num_tokens] = slot - first_of_row
                arrays["image_positions_MN"][slot] = b * sequence_length + begin + np.arange(num_tokens)
                _fill_slot(arrays, slot, image)
                slot += 1
            start += len(document.tokens_L)
    causal = slot == 0 and all(len(documents) <= 1 for documents in rows)
    return Batch.of(**{name: torch.from_numpy(array) for name, array in arrays.items()}, causal=causal)


def _fill_slot(arrays: Mapping[str, NDArray[Any]], slot: int, image: DocumentImage) -> None:
    """What a batch takes from an image itself; where that lacks something, the zeros stay."""
    arrays["latents_MNC"][slot] = image.latents_NC
    arrays["masked_MN"][slot] = image.masked_N
    arrays["visible_MN"][slot] = ~image.masked_N
    if image.timesteps_NR is not None and image.noise_NRC is not None:
        arrays["timesteps_MNR"][slot] = image.timesteps_NR
        arrays["noise_MNRC"][slot] = image.noise_NRC
    if "teacher_MNF" in arrays and image.teacher_NF is not None:
        arrays["teacher_MNF"][slot] = image.teacher_NF
