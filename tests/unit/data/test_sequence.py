import itertools
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmar_megatron.data.batch import IGNORE, Batch
from mmar_megatron.data.sequence import Document, DocumentBuilder, DocumentImage, Text, assemble
from mmar_megatron.data.tokenizer import Tokenizer, load_tokenizer

N, C, R = 4, 3, 2
TEXT = [300, 301, 302]


@pytest.fixture
def tokenizer(shapes_dir: Path) -> Tokenizer:
    return load_tokenizer(shapes_dir)


def image(masked: list[bool] | None = None) -> DocumentImage:
    generator = np.random.default_rng(0)
    return DocumentImage(
        latents_NC=generator.random((N, C), dtype=np.float32),
        masked_N=np.array(masked or [False] * N),
        timesteps_NR=generator.random((N, R), dtype=np.float32) if masked else None,
        noise_NRC=generator.random((N, R, C), dtype=np.float32) if masked else None,
    )


def build(tokenizer: Tokenizer, sequence_length: int = 16) -> DocumentBuilder:
    return DocumentBuilder(tokenizer, num_tokens=N, sequence_length=sequence_length)


def names(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    roles = {getattr(tokenizer, f"{role}_id"): role for role in ("bos", "eos", "pad", "begin_image", "end_image", "image")}
    return [roles.get(i, str(i)) for i in ids]


def test_text_to_image_layout(tokenizer: Tokenizer) -> None:
    document = build(tokenizer).text_to_image(TEXT, image=image([True, False, True, True]), sample_id=9)
    expected = ["bos", "300", "301", "302", "begin_image", *["image"] * N, "end_image", "eos"]
    assert names(tokenizer, document.tokens_L) == expected
    assert set(document.labels_L) == {IGNORE}
    assert document.image_start == 5


def test_image_only_is_text_to_image_without_text(tokenizer: Tokenizer) -> None:
    document = build(tokenizer).text_to_image([], image=image([True] * N), sample_id=9)
    assert names(tokenizer, document.tokens_L) == ["bos", "begin_image", *["image"] * N, "end_image", "eos"]
    assert document.image_start == 2


def test_image_to_text_layout(tokenizer: Tokenizer) -> None:
    document = build(tokenizer).image_to_text(TEXT, image=image(), sample_id=9)
    expected = ["bos", "begin_image", *["image"] * N, "end_image", "300", "301", "302", "eos"]
    assert names(tokenizer, document.tokens_L) == expected
    learned = {position: label for position, label in enumerate(document.labels_L) if label != IGNORE}
    end_image = expected.index("end_image")
    assert learned == {end_image: 300, end_image + 1: 301, end_image + 2: 302, end_image + 3: tokenizer.eos_id}
    assert document.image_start == 2


def test_long_text_is_cut_and_then_has_no_end(tokenizer: Tokenizer) -> None:
    builder = build(tokenizer, sequence_length=N + 4 + 2)
    painted = builder.text_to_image(TEXT, image=image([True] * N), sample_id=0)
    assert len(painted.tokens_L) == N + 4 + 2
    told = builder.image_to_text(TEXT, image=image(), sample_id=0)
    assert told.tokens_L[-2:] == TEXT[:2]
    assert [label for label in told.labels_L if label != IGNORE] == TEXT[:2]
    assert len(told.labels_L) == len(told.tokens_L)


def test_no_room_for_text(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=f"set data.sequence_length to {N + 5}"):
        build(tokenizer, sequence_length=N + 4)


def batch_of(rows: list[list[Document]], pad_id: int) -> Batch:
    return assemble(rows, sequence_length=24, image_shape=(N, C), timestep_multiplier=R, pad_id=pad_id)


def test_batch_of_one_document_and_an_empty_row(tokenizer: Tokenizer) -> None:
    masked = [True, False, True, True]
    document = build(tokenizer).text_to_image(TEXT, image=image(masked), sample_id=9)
    image_of = document.images[0].image
    batch = batch_of([[], [document]], tokenizer.pad_id)
    length = len(document.tokens_L)

    assert batch.sample_ids_BK.tolist() == [[-1], [9]]
    assert batch.tokens_BS[1].tolist() == document.tokens_L + [tokenizer.pad_id] * (24 - length)
    assert batch.position_ids_BS[1].tolist() == [*range(length), *[0] * (24 - length)]
    assert batch.document_ids_BS[1].tolist() == [0] * length + [-1] * (24 - length)
    assert batch.span_ids_BS[1].tolist() == [-1] * 5 + [0] * N + [-1] * (24 - 5 - N)
    assert (batch.tokens_BS.flatten()[batch.image_positions_MN[0]] == tokenizer.image_id).all()
    assert batch.image_positions_MN[0].tolist() == [24 + 5 + n for n in range(N)]
    assert batch.masked_MN[0].tolist() == masked
    assert batch.visible_MN[0].tolist() == [not m for m in masked]
    np.testing.assert_array_equal(batch.latents_MNC[0], image_of.latents_NC)
    np.testing.assert_array_equal(batch.timesteps_MNR[0], image_of.timesteps_NR)
    np.testing.assert_array_equal(batch.noise_MNRC[0], image_of.noise_NRC)

    assert set(batch.tokens_BS[0].tolist()) == {tokenizer.pad_id}
    assert set(batch.labels_BS[0].tolist()) == {IGNORE}
    assert set(batch.document_ids_BS[0].tolist()) == {-1}
    assert batch.num_labels == 0
    assert batch.num_masked == 3


@pytest.mark.parametrize("rows", [1, 0])
def test_a_batch_that_was_sent_to_another_process_is_the_same(tokenizer: Tokenizer, rows: int) -> None:
    document = build(tokenizer).text_to_image(TEXT, image=image([True, False, True, True]), sample_id=9)
    batch = batch_of([[document, document]] * rows + [[]], tokenizer.pad_id)
    for sent in (batch, replace(batch, teacher_MNF=torch.rand(len(batch.latents_MNC), N, 5))):
        received = pickle.loads(pickle.dumps(sent))
        assert vars(received).keys() == vars(sent).keys()
        for name, value in vars(sent).items():
            found = getattr(received, name)
            assert (
                (torch.equal(found, value) and found.dtype == value.dtype) if isinstance(value, torch.Tensor) else found is value
            )


def test_what_is_causal(tokenizer: Tokenizer) -> None:
    """A text a row at most, and no image anywhere; known without a look at the tensors, wherever the batch goes."""
    builder = build(tokenizer)
    text = builder.content([Text(TEXT, learn=True, end=True)], sample_id=1)
    told, painted = (
        builder.image_to_text(TEXT, image=image(), sample_id=2),
        builder.text_to_image(TEXT, image=image(), sample_id=3),
    )
    kinds: list[tuple[list[list[Document]], bool]] = [
        ([[text], [text]], True),
        ([[text], []], True),
        ([[]], True),
        ([[text, text], []], False),
        ([[text], [told]], False),
        ([[painted]], False),
    ]
    for rows, causal in kinds:
        batch = batch_of(rows, tokenizer.pad_id)
        assert batch.causal is causal
        copies = (pickle.loads(pickle.dumps(batch)), batch.to(torch.device("cpu")), batch.without_losses())
        assert [copy.causal for copy in copies] == [causal] * 3


def test_two_documents_in_a_row(tokenizer: Tokenizer) -> None:
    first = build(tokenizer).text_to_image([], image=image([True] * N), sample_id=1)
    second = build(tokenizer).image_to_text(TEXT, image=image(), sample_id=2)
    batch = batch_of([[first, second]], tokenizer.pad_id)
    a, b = len(first.tokens_L), len(second.tokens_L)
    assert batch.position_ids_BS[0, : a + b].tolist() == [*range(a), *range(b)]
    assert batch.document_ids_BS[0].tolist() == [0] * a + [1] * b + [-1] * (24 - a - b)
    assert batch.image_positions_MN.tolist() == [[2 + n for n in range(N)], [a + 2 + n for n in range(N)]]
    assert [int((batch.span_ids_BS == span).sum()) for span in (0, 1)] == [N, N]
    assert batch.labels_BS[0, a : a + b].tolist() == second.labels_L
    assert torch.equal(batch.visible_MN, torch.tensor([[False] * N, [True] * N]))


def test_a_batch_without_images_has_an_empty_slot(tokenizer: Tokenizer) -> None:
    text = build(tokenizer).content([Text(TEXT, learn=True, end=True)], sample_id=3)
    batch = batch_of([[text], []], tokenizer.pad_id)
    assert batch.latents_MNC.shape == (1, N, C)
    assert not (batch.visible_MN | batch.masked_MN).any()
    assert batch.num_labels == len(TEXT) + 1


def test_content_with_images_before_within_and_after_text(tokenizer: Tokenizer) -> None:
    seen, painted = image(), image([True] * N)
    question, answer = [7, 8], [11, 12, 13]
    parts: list[Text | DocumentImage] = [
        seen,
        Text(question, learn=False, end=False),
        seen,
        Text(answer, learn=True, end=True),
        painted,
    ]
    document = build(tokenizer, sequence_length=64).content(parts, sample_id=0)
    picture = [tokenizer.begin_image_id, *[tokenizer.image_id] * N, tokenizer.end_image_id]
    assert document.tokens_L == [
        *(tokenizer.bos_id, *picture, *question, *picture, *answer, tokenizer.eos_id, *picture),
    ]
    begin = 1 + len(picture) + len(question) + len(picture)
    assert {i: label for i, label in enumerate(document.labels_L) if label != IGNORE} == {
        begin - 1: 11,
        begin: 12,
        begin + 1: 13,
        begin + 2: tokenizer.eos_id,
    }
    assert [document.tokens_L[start - 1 : start + N + 1] for start, _ in document.images] == [picture] * 3
    batch = assemble(
        [[document, document]], sequence_length=128, image_shape=(N, C), timestep_multiplier=R, pad_id=tokenizer.pad_id
    )
    assert batch.num_masked == 2 * N
    spans = [span for span, _ in itertools.groupby(batch.span_ids_BS[0].tolist()) if span >= 0]
    assert spans == [0, 1, 2, 3, 4, 5]
    assert batch.span_ids_BS.flatten()[batch.image_positions_MN].tolist() == [[m] * N for m in range(6)]


def test_what_just_fits_is_whole(tokenizer: Tokenizer) -> None:
    builder = build(tokenizer, sequence_length=N + 4 + len(TEXT))
    text, ended = Text(TEXT, learn=True, end=False), Text(TEXT, learn=True, end=True)
    for document, last in (
        (builder.text_to_image(TEXT, image=image([True] * N), sample_id=0), tokenizer.eos_id),
        (builder.image_to_text(TEXT, image=image(), sample_id=0), tokenizer.eos_id),
        (builder.content([image(), ended], sample_id=0), tokenizer.eos_id),
        (builder.content([ended, image()], sample_id=0), tokenizer.end_image_id),
        (builder.content([text, image([True] * N)], sample_id=0), tokenizer.end_image_id),
    ):
        assert document.tokens_L[-1] == last
        assert len(document.images) == 1
        assert not document.truncated


@pytest.mark.parametrize(
    ("parts", "tokens", "images"),
    [
        (lambda: [Text([5] * 40, learn=True, end=True)], [5] * 31, 0),
        (lambda: [Text([5] * 20, learn=True, end=True), image()], [5] * 20, 1),
        (lambda: [Text([5] * 26, learn=True, end=True), image(), Text([6], learn=True, end=True)], [5] * 26, 0),
        (lambda: [Text([5] * 40, learn=False, end=True), image([True] * N)], [5] * (31 - N - 2), 1),
        (lambda: [Text([5] * 40, learn=False, end=True), image()], [5] * 31, 0),
    ],
    ids=["text", "fits", "image", "painted", "seen"],
)
def test_too_long_content_is_cut(tokenizer: Tokenizer, parts: Callable[[], Any], tokens: list[int], images: int) -> None:
    document = build(tokenizer, sequence_length=32).content(parts(), sample_id=0)
    assert document.tokens_L[1 : 1 + len(tokens)] == tokens
    assert len(document.images) == images
    assert len(document.labels_L) == len(document.tokens_L) <= 32
    assert document.truncated == (images == 0 or document.images[-1].image.masked_N.any())


def test_what_is_learned_is_found_with_the_batch(tokenizer: Tokenizer) -> None:
    """Places of labels, masked and aligned tokens; alike when labels and masks change, and when all is to be learned no more."""
    painted = build(tokenizer).text_to_image(TEXT, image=image([True, False, True, True]), sample_id=1)
    told = build(tokenizer).image_to_text(TEXT, image=image(), sample_id=2)
    batch = batch_of([[painted], [told]], tokenizer.pad_id)
    position_L, row_L = batch.labelled_L // 2, batch.labelled_L % 2
    assert batch.labels_BS[row_L, position_L].tolist() == [*TEXT, tokenizer.eos_id]
    assert batch.masked_P.tolist() == [0, 2, 3]
    assert batch.num_aligned == 0
    with_teacher = batch.changed(teacher_MNF=torch.rand(2, N, 5))
    assert with_teacher.aligned_V.tolist() == [1, *range(N, 2 * N)]
    assert with_teacher.changed(masked_MN=torch.ones_like(batch.masked_MN)).masked_P.tolist() == list(range(2 * N))
    nothing = with_teacher.without_losses()
    assert (nothing.num_labels, nothing.num_masked, nothing.num_aligned) == (0, 0, 0)
