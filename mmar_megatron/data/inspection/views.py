"""Samples as they are stored, and rows of the training stream as the model reads them.

Axes: S positions of a row, N tokens of an image, H, W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mmar_megatron.data.batch import IGNORE, Batch
from mmar_megatron.data.codec import PatchCodec
from mmar_megatron.data.documents import DocumentMaker
from mmar_megatron.data.draw import Use, sample_generator, source_seed
from mmar_megatron.data.index import SPLITS, Split
from mmar_megatron.data.inspection.facts import evenly
from mmar_megatron.data.inspection.plans import name_of
from mmar_megatron.data.sequence import Document, PlacedImage
from mmar_megatron.data.shards import Sample, UndecodableSampleError
from mmar_megatron.data.source import DataSet, DataSource
from mmar_megatron.data.stream import DocumentPlan, Stream, StreamState, Task
from mmar_megatron.data.tokenizer import SPECIAL_TOKENS, Tokenizer

Pixels = NDArray[np.uint8]
Kind = Literal["text", "special", "seen", "masked", "padding"]
KINDS: tuple[Kind, ...] = ("text", "special", "seen", "masked", "padding")
"""What stands at a position; an image's tokens are seen or masked."""
_GREY, _STRIPE = 160, 110
_LARGE = 128
"""Pixels along a side."""
_LOOK_BACK = 8
"""Tokens before one that decide how it is written."""
MOST_ATTENTION = 1024
"""Positions of a row whose attention is drawn."""

# --- samples --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SampleView:
    """A sample of the contact sheet."""

    key: str
    number: int
    """Within its split."""
    split: Split
    pictures: list[Pixels]
    """[H, W, 3]; none where only moments are stored."""
    captions: dict[str, list[str]]
    """By language."""
    content: list[dict[str, Any]] | None
    damage: str | None
    """Why it cannot be shown."""


def gather_samples(source: DataSource, opened: DataSet, *, most: int) -> list[SampleView]:
    """So many samples of a data set, evenly spread over each of its splits; of each split at least one."""
    index = opened.index
    views = []
    for split in SPLITS:
        count = index.count(split)
        if not count:
            continue
        reader = source.reader(split, of=opened)
        numbers = evenly(count, most=max(1, round(most * count / len(index))))
        reader.read_ahead(numbers)
        for number in numbers:
            try:
                sample = reader.read(number)
                sample.decode_pictures()
            except UndecodableSampleError as error:
                views.append(
                    SampleView(key="", number=number, split=split, pictures=[], captions={}, content=None, damage=str(error))
                )
                continue
            views.append(
                SampleView(
                    key=sample.key,
                    number=number,
                    split=split,
                    pictures=sample.images,
                    captions=sample.captions,
                    content=sample.content,
                    damage=None,
                )
            )
    return views


# --- rows -----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A position of a row."""

    kind: Kind
    text: str
    """What the token stands for; empty for an image's."""
    token: int
    learned: bool
    """The text token is to be predicted, from the position before."""
    document: int
    """-1: padding."""
    position: int
    """Within the document."""
    image: int
    """Of the row; -1: none."""
    place: int
    """Of an image's token within the image; else -1."""


@dataclass(frozen=True, kw_only=True)
class ImageView:
    """An image of a document."""

    picture: Pixels | None
    """[H, W, 3], masked tokens hatched in grey; None where no pixels are at hand."""
    masked: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class DocumentView:
    """A document of a row."""

    source: str
    key: str
    task: str
    epoch: int
    length: int
    labels: int
    """Text tokens to be learned."""
    truncated: bool
    images: list[ImageView]
    text: str
    """All of its text."""


@dataclass(frozen=True, kw_only=True)
class RowView:
    """A row of the stream."""

    cells: list[Cell]
    documents: list[DocumentView]
    skipped: int
    """Documents whose samples cannot be decoded."""

    def count(self, kind: Kind) -> int:
        """How many of its positions are of this kind."""
        return sum(cell.kind == kind for cell in self.cells)


@dataclass(frozen=True, kw_only=True)
class AttentionView:
    """What the positions of one row may attend to."""

    row: int
    allowed_SS: NDArray[np.bool_]
    """(query, key)"""
    padding_S: NDArray[np.bool_]
    share: float
    """Of the pairs, those that are allowed."""
    whole: bool
    """All of the row, and not just its first positions."""


Allowed = Callable[..., Tensor]
"""`mixed_attention_allowed`: (document_ids_BS, span_ids_BS) -> bool [B, S, S]."""


class RowViewer:
    """Makes rows of the stream as a run does, and tells what is in them.

    Args:
        source: the opened data sets, with the settings of the stream.
        seed: of the stream, its masks and its noise.
    """

    def __init__(self, source: DataSource, *, seed: int) -> None:
        self._source = source
        self._readers = [source.reader("train", of=opened) for opened in source.sets]
        self._maker = DocumentMaker(source, readers=self._readers, seed=seed, timestep_multiplier=1)
        self._seeds = [source_seed(seed, opened.name) for opened in source.sets]
        self._stream = Stream(source.planner(seed=seed), StreamState())

    def rows(self, count: int) -> tuple[list[RowView], Batch]:
        """The first rows of the stream, and the microbatch that they make.

        Raises:
            BadDataError: the index does not fit the samples.
            StorageError: the bytes could not be had.
        """
        planned = list(self._stream.rows(0, count))
        made = [[(plan, document) for plan in plans if (document := self._make(plan))] for plans in planned]
        batch = self._source.assemble([[document for _, document in row] for row in made], timestep_multiplier=1)
        masked_P = np.zeros(batch.tokens_BS.numel(), dtype=np.bool_)
        masked_P[batch.image_positions_MN[batch.masked_MN].numpy()] = True
        masked_BS = masked_P.reshape(batch.tokens_BS.shape)
        views = [
            RowView(
                cells=_cells(batch, b, masked_S=masked_BS[b], tokenizer=self._source.tokenizer),
                documents=[self._view(plan, document) for plan, document in row],
                skipped=len(planned[b]) - len(row),
            )
            for b, row in enumerate(made)
        ]
        return views, batch

    def _make(self, plan: DocumentPlan) -> Document | None:
        try:
            return self._maker.make(plan)
        except UndecodableSampleError:
            return None

    def _view(self, plan: DocumentPlan, document: Document) -> DocumentView:
        sample = self._readers[plan.source].read(plan.number)
        return DocumentView(
            source=self._source.sets[plan.source].name,
            key=sample.key,
            task=name_of(plan.task),
            epoch=plan.epoch,
            length=len(document.tokens_L),
            labels=sum(label != IGNORE for label in document.labels_L),
            truncated=document.truncated,
            images=[self._image(plan, sample, document, k) for k in range(len(document.images))],
            text=self._source.tokenizer.decode(document.tokens_L),
        )

    def _image(self, plan: DocumentPlan, sample: Sample, document: Document, k: int) -> ImageView:
        placed = document.images[k]
        masked_N = placed.image.masked_N
        picture = self._pixels(plan, sample, placed, number=_picture_of(plan, sample, k, painted=bool(masked_N.any())))
        grid = self._source.codec.grid_height, self._source.codec.grid_width
        shown = None if picture is None else greyed(picture, masked_N, grid=grid)
        return ImageView(picture=shown, masked=int(masked_N.sum()), tokens=len(masked_N))

    def _pixels(self, plan: DocumentPlan, sample: Sample, placed: PlacedImage, *, number: int) -> Pixels | None:
        """What the model sees, decoded where that is lossless; else the stored picture, mirrored where the latents are."""
        if isinstance(self._source.codec, PatchCodec):
            return self._source.codec.decode(placed.image.latents_NC)
        if number >= sample.num_pictures:
            return None
        generator = sample_generator(plan.number, seed=self._seeds[plan.source], epoch=plan.epoch, use=Use.TRAINING)
        flipped = generator.random() < self._source.config.horizontal_flip  # the first draw of a document, see `DocumentMaker`
        picture_HW3 = sample.image(number)
        return picture_HW3[:, ::-1] if flipped else picture_HW3


def _picture_of(plan: DocumentPlan, sample: Sample, k: int, *, painted: bool) -> int:
    """Which of the sample's pictures is the document's k-th image: of cut content, the one to be painted is not lost."""
    if sample.content is None:
        return 0
    images: list[int] = [part["image"] for part in sample.content if "image" in part]
    return images[-1] if painted or plan.task is Task.IMAGE_ONLY else images[k]


def greyed(picture_HW3: Pixels, masked_N: NDArray[np.bool_], *, grid: tuple[int, int]) -> Pixels:
    """The picture, each pixel as often as it takes to be large, with its masked tokens hatched in grey, faint below."""
    scale = max(1, -(-_LARGE // picture_HW3.shape[0]))
    large_HW3 = picture_HW3.repeat(scale, axis=0).repeat(scale, axis=1)
    y_H1, x_1W = np.ogrid[: large_HW3.shape[0], : large_HW3.shape[1]]
    masked_HW = masked_N.reshape(grid)[y_H1 * grid[0] // len(y_H1), x_1W * grid[1] // x_1W.size]
    faint_HW3 = (large_HW3.astype(np.uint16) + 4 * _GREY) // 5
    faint_HW3[(y_H1 + x_1W) % 8 < 2] = _STRIPE
    return np.where(masked_HW[..., None], faint_HW3, large_HW3).astype(np.uint8)


def _cells(batch: Batch, b: int, *, masked_S: NDArray[np.bool_], tokenizer: Tokenizer) -> list[Cell]:
    tokens: list[int] = batch.tokens_BS[b].tolist()
    labels: list[int] = batch.labels_BS[b].tolist()
    documents: list[int] = batch.document_ids_BS[b].tolist()
    positions: list[int] = batch.position_ids_BS[b].tolist()
    images: list[int] = batch.span_ids_BS[b].tolist()
    names = {getattr(tokenizer, f"{role}_id"): f"<{role}>" for role in SPECIAL_TOKENS}
    texts = token_texts(tokens, tokenizer=tokenizer, special=names)
    cells: list[Cell] = []
    place = -1
    for s, token in enumerate(tokens):
        place = -1 if images[s] < 0 else place + 1 if images[s] == images[s - 1] else 0
        kind: Kind = "text"
        if documents[s] < 0:
            kind = "padding"
        elif images[s] >= 0:
            kind = "masked" if masked_S[s] else "seen"
        elif token in names:
            kind = "special"
        cells.append(
            Cell(
                kind=kind,
                text="" if kind in ("seen", "masked", "padding") else texts[s],
                token=token,
                learned=s > 0 and labels[s - 1] != IGNORE,
                document=documents[s],
                position=positions[s],
                image=images[s],
                place=place,
            )
        )
    return cells


def token_texts(tokens: Sequence[int], *, tokenizer: Tokenizer, special: dict[int, str]) -> list[str]:
    """What each token adds to the text before it (a character in several tokens comes with the last); special tokens by names.

    A tokenizer's own names of its pieces are not for reading (a byte-level one writes é as two other letters), and a piece
    decoded by itself has lost the blank before it.
    """
    texts, run = list[str](), list[int]()
    for token in tokens:
        if token in special:
            run = []
            texts.append(special[token])
            continue
        before = tokenizer.decode(run[-_LOOK_BACK:]).rstrip("�")
        run.append(token)
        after = tokenizer.decode(run[-_LOOK_BACK - 1 :]).rstrip("�")
        texts.append(after[len(before) :] if after.startswith(before) else tokenizer.decode([token]))
    return texts


def gather_attention(rows: Sequence[RowView], batch: Batch, *, allowed: Allowed) -> AttentionView | None:
    """The attention of the row with most documents, for at most `MOST_ATTENTION` positions; None where there is no row."""
    if not rows:
        return None
    chosen = max(range(len(rows)), key=lambda b: (len(rows[b].documents), -b))
    length = batch.tokens_BS.shape[1]
    ids = [tensor[chosen : chosen + 1, :MOST_ATTENTION] for tensor in (batch.document_ids_BS, batch.span_ids_BS)]
    allowed_SS = allowed(document_ids_BS=ids[0], span_ids_BS=ids[1])[0].numpy()
    return AttentionView(
        row=chosen,
        allowed_SS=allowed_SS,
        padding_S=ids[0][0].numpy() < 0,
        share=float(allowed_SS.mean()),
        whole=length <= MOST_ATTENTION,
    )
