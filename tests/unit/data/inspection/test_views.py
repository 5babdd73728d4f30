from __future__ import annotations

from dataclasses import replace
from itertools import groupby, islice
from pathlib import Path

import numpy as np
import pytest
import torch

from mmar_megatron.data.batch import IGNORE
from mmar_megatron.data.inspection import views as views_module
from mmar_megatron.data.inspection.opening import open_directory
from mmar_megatron.data.inspection.views import (
    RowViewer,
    gather_attention,
    gather_samples,
    greyed,
    token_texts,
)
from mmar_megatron.data.loader import TrainLoader
from mmar_megatron.data.source import DataSource
from mmar_megatron.model.attention import mixed_attention_allowed
from tests.unit.data.conftest import TRAIN
from tests.unit.data.damage import damage_image
from tests.unit.data.inspection.conftest import SEQUENCE_LENGTH, picture, talks

SEED, ROWS = 3, 12


def test_rows_are_what_a_run_reads(mix: DataSource) -> None:
    rows, batch = RowViewer(mix, seed=SEED).rows(ROWS)
    single = DataSource(replace(mix.config, num_workers=0))
    loader = TrainLoader(single, seed=SEED, timestep_multiplier=1, micro_batch_size=ROWS, global_batch_size=ROWS)
    (read,) = islice(loader, 1)
    for name, value in vars(read).items():
        found = getattr(batch, name)
        assert torch.equal(found, value) if isinstance(value, torch.Tensor) else found is value, name
    assert len(rows) == ROWS
    assert all(len(row.cells) == SEQUENCE_LENGTH for row in rows)
    assert {document.source for row in rows for document in row.documents} == {"shapes", "talks"}
    tasks = {document.task for row in rows for document in row.documents}
    assert {"content", "text_to_image", "image_to_text"} <= tasks


def test_cells_say_what_the_batch_says(mix: DataSource) -> None:
    rows, batch = RowViewer(mix, seed=SEED).rows(ROWS)
    masked = set(batch.image_positions_MN[batch.masked_MN].tolist())
    seen = set(batch.image_positions_MN[batch.visible_MN].tolist())
    special = {getattr(mix.tokenizer, f"{role}_id") for role in ("bos", "eos", "begin_image", "end_image")}
    for b, row in enumerate(rows):
        for s, cell in enumerate(row.cells):
            place = b * SEQUENCE_LENGTH + s
            assert (cell.kind == "masked") == (place in masked)
            assert (cell.kind == "seen") == (place in seen)
            assert (cell.kind == "padding") == (batch.document_ids_BS[b, s] == -1)
            assert (cell.kind == "special") == (int(batch.tokens_BS[b, s]) in special)
            assert cell.learned == (s > 0 and int(batch.labels_BS[b, s - 1]) == cell.token)
            if cell.image >= 0:
                assert int(batch.image_positions_MN.flatten()[batch.image_positions_MN.flatten() == place]) == place
        places = [list(run) for image, run in groupby(row.cells, key=lambda cell: cell.image) if image >= 0]
        assert all([cell.place for cell in run] == list(range(len(run))) for run in places)
        learned = sum(cell.learned for cell in row.cells)
        assert learned == int((batch.labels_BS[b] != IGNORE).sum()) == sum(document.labels for document in row.documents)
        assert sum(document.length for document in row.documents) == len(row.cells) - row.count("padding")
        images = [image for document in row.documents for image in document.images]
        assert sum(image.masked for image in images) == row.count("masked")
        assert sum(image.tokens for image in images) == row.count("masked") + row.count("seen")


def test_texts_of_the_cells_make_the_text(mix: DataSource) -> None:
    rows, _ = RowViewer(mix, seed=SEED).rows(ROWS)
    whole = [document.text for row in rows for document in row.documents]
    shown = []
    for row in rows:
        for _, cells in groupby(row.cells, key=lambda cell: cell.document):
            run = list(cells)
            shown += ["".join(cell.text for cell in run if cell.kind == "text")] if run[0].document >= 0 else []
    assert [text.replace(" ", "") for text in shown] == [text.replace(" ", "") for text in whole]
    assert any("蓝色的小方块" in text for text in shown)  # bytes of characters that the vocabulary has not


def test_token_texts_keep_blanks_and_name_special_tokens(mix: DataSource) -> None:
    tokens = [mix.tokenizer.bos_id, *mix.tokenizer.encode("a red  circle"), mix.tokenizer.eos_id]
    names = {mix.tokenizer.bos_id: "<bos>", mix.tokenizer.eos_id: "<eos>"}
    texts = token_texts(tokens, tokenizer=mix.tokenizer, special=names)
    assert len(texts) == len(tokens)
    assert "".join(texts) == "<bos>a red  circle<eos>"


def test_pictures_are_the_samples_own(mix: DataSource) -> None:
    rows, _ = RowViewer(mix, seed=SEED).rows(ROWS)
    for row in rows:
        for document in row.documents:
            if document.source != "talks":
                continue
            number = int(document.key.removeprefix("talk_"))
            for k, view in enumerate(document.images):
                assert view.picture is not None
                original = picture(10 * number + (k if document.task != "image_only" else talks()[number][2] - 1))
                large = original.repeat(4, axis=0).repeat(4, axis=1)
                same = (view.picture == large).all(axis=-1)
                share = view.masked / view.tokens
                assert 1 - same.mean() == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("codec", ["patch", "stored"])
def test_mirrored_pictures_are_shown_mirrored(mix: DataSource, codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = DataSource(replace(mix.config, horizontal_flip=0.5))
    if codec == "stored":  # of which nothing can be decoded
        monkeypatch.setattr(views_module, "PatchCodec", type(None))
    rows, batch = RowViewer(source, seed=SEED).rows(ROWS)
    shown = [image for row in rows for document in row.documents for image in document.images]
    for view, latents_NC, masked_N in zip(shown, batch.latents_MNC.numpy(), batch.masked_MN.numpy(), strict=True):
        grid = (mix.codec.grid_height, mix.codec.grid_width)
        np.testing.assert_array_equal(view.picture, greyed(mix.codec.decode(latents_NC), masked_N, grid=grid))


def test_masked_tokens_are_grey_and_others_untouched() -> None:
    pixels = picture(0)
    masked_N = np.zeros(64, dtype=np.bool_)
    masked_N[9] = True  # row 1, column 1
    shown = greyed(pixels, masked_N, grid=(8, 8))
    assert shown.shape == (128, 128, 3)
    changed = (shown != pixels.repeat(4, axis=0).repeat(4, axis=1)).any(axis=-1)
    expected = np.zeros((128, 128), dtype=np.bool_)
    expected[16:32, 16:32] = True
    assert not changed[~expected].any()
    assert changed[expected].mean() > 0.95


def test_attention_is_of_the_row_with_most_documents(mix: DataSource) -> None:
    rows, batch = RowViewer(mix, seed=SEED).rows(ROWS)
    view = gather_attention(rows, batch, allowed=mixed_attention_allowed)
    assert view is not None and view.whole
    assert len(rows[view.row].documents) == max(len(row.documents) for row in rows)
    cells = rows[view.row].cells
    for q, query in enumerate(cells):
        for k, key in enumerate(cells):
            same_image = query.image == key.image >= 0
            assert view.allowed_SS[q, k] == (query.document == key.document and (k <= q or same_image))
    assert view.padding_S.tolist() == [cell.kind == "padding" for cell in cells]
    assert view.share == view.allowed_SS.mean()


def test_attention_of_a_long_row_is_that_of_its_begin(mix: DataSource, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, batch = RowViewer(mix, seed=SEED).rows(2)
    whole = gather_attention(rows, batch, allowed=mixed_attention_allowed)
    monkeypatch.setattr(views_module, "MOST_ATTENTION", 50)
    part = gather_attention(rows, batch, allowed=mixed_attention_allowed)
    assert whole is not None and part is not None and not part.whole
    np.testing.assert_array_equal(part.allowed_SS, whole.allowed_SS[:50, :50])


def test_samples_are_spread_over_both_splits(mix: DataSource) -> None:
    views = gather_samples(mix, mix.sets[1], most=12)
    assert [view.split for view in views] == ["train"] * 10 + ["validation"] * 2
    assert [view.number for view in views][:10] == [0, 2, 4, 6, 8, 11, 13, 15, 17, 19]
    for view in views:
        number = view.number + (20 if view.split == "validation" else 0)
        _, metadata, pictures = talks()[number]
        assert view.key == f"talk_{number:02d}"
        assert (view.captions, view.content) == (metadata.get("captions", {}), metadata.get("content"))
        assert len(view.pictures) == pictures
        for k, pixels in enumerate(view.pictures):
            np.testing.assert_array_equal(pixels, picture(10 * number + k))


def test_moments_alone_have_no_pictures(moments_dir: Path) -> None:
    source = open_directory(str(moments_dir), sequence_length=SEQUENCE_LENGTH)
    assert all(view.pictures == [] and view.damage is None for view in gather_samples(source, source.sets[0], most=6))
    rows, _ = RowViewer(source, seed=SEED).rows(4)
    images = [image for row in rows for document in row.documents for image in document.images]
    assert images and all(image.picture is None for image in images)


def test_damage_is_told_and_passed_over(shapes_copy: Path) -> None:
    for number in range(TRAIN):
        if number % 2:
            damage_image(shapes_copy, split="train", number=number)
    source = open_directory(str(shapes_copy))
    views = gather_samples(source, source.sets[0], most=TRAIN)
    assert {bool(view.damage) for view in views} == {True, False}
    rows, _ = RowViewer(source, seed=SEED).rows(8)
    assert sum(row.skipped for row in rows) > 0
    assert all(len(row.documents) + row.skipped == 1 for row in rows)
