"""The loader over a mix of pictures with captions, texts and conversations, packed and not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from mmar_megatron.config import DataConfig, SourceConfig, TaskConfig
from mmar_megatron.data.batch import IGNORE, Batch
from mmar_megatron.data.codec import PatchCodec
from mmar_megatron.data.held_out import HeldOut, ValidationLoader
from mmar_megatron.data.index import CONTENT, Index
from mmar_megatron.data.loader import TrainLoader
from mmar_megatron.data.prepare import make_shapes
from mmar_megatron.data.source import DataSource
from mmar_megatron.data.stream import StreamState
from tests.unit.data.damage import damage_image
from tests.unit.data.mixes import write_talks
from tests.unit.data.test_loader import all_rows, rows

CODEC = PatchCodec(image_size=32, patch_size=8)
N = CODEC.num_tokens


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("mix")
    make_shapes(directory / "shapes", codec=CODEC, train=60, validation=22, log=lambda _: None)
    write_talks(directory / "talks", tokenizer=directory / "shapes", codec=CODEC)
    return directory


@pytest.fixture(params=[False, True], ids=["unpacked", "packed"])
def config(directory: Path, request: pytest.FixtureRequest) -> DataConfig:
    config = DataConfig(
        sources={
            "pictures": SourceConfig(path=str(directory / "shapes"), weight=2.0, tasks=TaskConfig(image_only=0.5)),
            "talks": SourceConfig(path=str(directory / "talks"), weight=1.0),
        },
        sequence_length=192,
        packing=request.param,
        packing_window=48,
        num_workers=0,
    )
    config.codec.patch_size = 8
    return config


def loader(config: DataConfig, *, rank: int = 0, ranks: int = 1, state: StreamState | None = None) -> TrainLoader:
    return TrainLoader(
        DataSource(config),
        seed=5,
        timestep_multiplier=2,
        micro_batch_size=2,
        global_batch_size=8,
        data_parallel_rank=rank,
        data_parallel_size=ranks,
        state=state,
    )


def test_steps_are_the_same_at_any_number_of_ranks_and_workers_and_after_a_resume(config: DataConfig) -> None:
    one = loader(config)
    steps = [list(islice(it, 4)) for it in [iter(one)] for _ in range(12)]
    many = [loader(config, rank=r, ranks=2) for r in range(2)]
    halves = [iter(each) for each in many]
    for step in steps:
        assert Counter(all_rows([b for half in halves for b in islice(half, 2)])) == Counter(all_rows(step))
    assert one.state == many[0].state == many[1].state
    assert all_rows(islice(loader(replace(config, num_workers=2)), 48)) == all_rows([b for step in steps for b in step])

    stopped = loader(config)
    list(islice(stopped, 7 * 4))
    resumed = loader(config, ranks=1, state=StreamState(**vars(stopped.state)))
    assert all_rows(islice(resumed, 5 * 4)) == all_rows([b for step in steps[7:] for b in step])
    assert resumed.state == one.state


def documents_of(batch: Batch) -> Iterator[tuple[int, int, list[int], list[int]]]:
    """(row, document, tokens, labels)"""
    for b, ids in enumerate(batch.document_ids_BS):
        for d in range(int(ids.max()) + 1):
            inside = ids == d
            assert batch.position_ids_BS[b][inside].tolist() == list(range(int(inside.sum())))
            yield b, d, batch.tokens_BS[b][inside].tolist(), batch.labels_BS[b][inside].tolist()


def test_documents_hold_what_their_samples_say(config: DataConfig) -> None:
    found = loader(config)
    source = found.source
    tokenizer = source.tokenizer
    readers = [source.reader("train", of=opened) for opened in source.sets]
    kinds: Counter[str] = Counter()
    for batch in islice(found, 60):
        for b, d, tokens, labels in documents_of(batch):
            name, number = source.name_of(int(batch.sample_ids_BK[b, d])).split(":")
            sample = readers[name == "talks"].read(int(number))
            text, learned = tokenizer.decode(tokens), [label for label in labels if label != IGNORE]
            images = tokens.count(tokenizer.begin_image_id)
            if sample.content is None:
                assert images == 1
                assert text in ("", *sample.captions["en"])
                kinds["pair"] += 1
                assert not learned or tokenizer.decode(learned) == text
                continue
            if not text:  # the caption was dropped
                assert "image" in sample.content[-1] and images == 1
                kinds["dropped"] += 1
                continue
            parts = [part["text"] for part in sample.content if "text" in part]
            # SentencePiece puts a space before each part.
            assert text.replace(" ", "") == "".join(parts).replace(" ", "")
            assert images == sum("image" in part for part in sample.content)
            answers = [part["text"] for part in sample.content if "text" in part and part.get("learn")]
            assert tokenizer.decode(learned).replace(" ", "") == "".join(answers).replace(" ", "")
            assert learned.count(tokenizer.eos_id) == len(answers)
            kinds[f"{images} images"] += 1
    assert set(kinds) == {"pair", "dropped", "0 images", "1 images", "2 images"}
    if not config.packing:
        return
    assert found.state.tokens / (60 // 4 * 8 * 192) > 0.9


def test_pictures_stand_where_their_tokens_are(config: DataConfig) -> None:
    found = loader(replace(config, caption_dropout=0.0))
    source = found.source
    readers = [source.reader("train", of=opened) for opened in source.sets]
    masked = 0
    for batch in islice(found, 20):
        assert (batch.tokens_BS.flatten()[batch.image_positions_MN] == source.tokenizer.image_id).all()
        assert (batch.tokens_BS == source.tokenizer.image_id).sum() == batch.image_positions_MN.numel()
        assert torch.equal(batch.span_ids_BS >= 0, batch.tokens_BS == source.tokenizer.image_id)
        m = 0
        for b, d, tokens, _ in documents_of(batch):
            name, number = source.name_of(int(batch.sample_ids_BK[b, d])).split(":")
            sample = readers[name == "talks"].read(int(number))
            for k in range(tokens.count(source.tokenizer.begin_image_id)):
                assert (source.codec.decode(batch.latents_MNC[m].numpy()) == sample.image(k)).all()
                paints = sample.content is not None and k == 1 and "image" in sample.content[-1]
                assert not sample.content or bool(batch.masked_MN[m].any()) == paints
                masked += paints
                m += 1
        assert m == len(batch.latents_MNC)
    assert masked > 0


def test_without_its_text_the_picture_that_is_painted_is_left(config: DataConfig) -> None:
    talks, tokenizer = config.sources["talks"], config.sources["pictures"].path
    found = loader(replace(config, sources={"talks": talks}, tokenizer=tokenizer, caption_dropout=1.0))
    reader, decode = found.source.reader("train"), found.source.codec.decode
    painted = 0
    for batch in islice(found, 30):
        m = 0
        for b, d, tokens, _ in documents_of(batch):
            pictures = tokens.count(found.source.tokenizer.begin_image_id)
            if batch.masked_MN[m : m + pictures].any():
                assert pictures == 1
                assert (decode(batch.latents_MNC[m].numpy()) == reader.read(int(batch.sample_ids_BK[b, d])).image(1)).all()
                painted += 1
            m += pictures
    assert painted > 0


def test_bad_samples_are_left_out_alike_and_counted_by_source(config: DataConfig, tmp_path: Path, directory: Path) -> None:
    write_talks(tmp_path / "talks", tokenizer=directory / "shapes", codec=CODEC)
    numbers = [1, 5, 9]  # about one picture
    for number in numbers:
        damage_image(tmp_path / "talks", split="train", number=number)
    talks = replace(config.sources["talks"], path=str(tmp_path / "talks"))
    damaged = replace(config, sources={**config.sources, "talks": talks}, max_bad_fraction=0.02)
    good, one, workers = loader(config), loader(damaged), loader(replace(damaged, num_workers=2))
    halves = [loader(damaged, rank=r, ranks=2) for r in range(2)]
    microbatches = 60 if config.packing else 140
    all_good, all_bad = list(islice(good, microbatches)), list(islice(one, microbatches))
    assert all_rows(islice(workers, microbatches)) == all_rows(all_bad)
    assert Counter(all_rows([b for half in halves for b in islice(half, microbatches // 2)])) == Counter(all_rows(all_bad))
    missing = len(sample_ids(all_good)) - len(sample_ids(all_bad))
    assert set(sample_ids(all_good)) - set(sample_ids(all_bad)) == {60 + 22 + number for number in numbers}
    for counts in (one.counts, workers.counts):
        assert (counts["pictures"].skipped, counts["talks"].skipped) == (0, missing)
    assert sum(half.counts["talks"].skipped for half in halves) == missing
    assert one.state.documents == good.state.documents  # their places count: nothing else moves
    with pytest.raises(
        ValueError,
        match=r"samples could not .* \(\d+ of talks; the last one: shard .*/talks/train-\d+.tar at \d+: ",
    ):
        list(islice(loader(replace(damaged, max_bad_fraction=0.0)), 200))


def sample_ids(batches: list[Batch]) -> list[int]:
    return [i for batch in batches for i in batch.sample_ids_BK.flatten().tolist() if i >= 0]


def test_validation_of_talks_has_their_text_loss(config: DataConfig) -> None:
    source = DataSource(replace(config, validation_source="talks"))
    assert not source.validation_set.has_pairs
    batches = list(
        ValidationLoader(
            HeldOut(source), seed=1, timesteps=2, mask_ratios=[1.0], samples=100, micro_batch_size=4, task="image_to_text"
        )
    )
    assert sample_ids(batches) == [60 + 22 + 90 + number for number in range(12)]
    samples = [source.reader("validation").read(number) for number in range(12)]
    pictures = [sample.image(k) for sample in samples for k in range(sum("image" in part for part in sample.content or []))]
    found = source.codec.decode(torch.cat([batch.latents_MNC for batch in batches]).numpy())
    np.testing.assert_array_equal(found, pictures)
    assert sum(int(batch.num_labels) for batch in batches) > 0
    with pytest.raises(ValueError, match=r"talks has no pictures with captions: set preview.every to 0"):
        HeldOut(source).captions(2)


def test_of_pairs_and_content_in_one_set_the_pairs_validate(config: DataConfig) -> None:
    source = DataSource(config)
    index = source.validation_set.index
    index.kind = index.kind.copy()
    index.kind[61::3] = CONTENT
    held_out = HeldOut(source)
    samples = [held_out.read(place) for place in range(len(held_out))]
    assert [sample.sample_id for sample in samples] == [60 + number for number in range(22) if number % 3 != 1]
    assert [held_out.metadata(place) for place in range(len(held_out))] == [sample.metadata for sample in samples]


def test_the_plan_has_each_sources_weight_and_tasks(config: DataConfig) -> None:
    pictures = replace(config.sources["pictures"], tasks=TaskConfig(text_to_image=0.6, image_to_text=0.3, image_only=0.1))
    sources = DataSource(replace(config, sources={**config.sources, "pictures": pictures})).planner(seed=1).sources
    assert [(source.name, source.weight) for source in sources] == [("pictures", 2.0), ("talks", 1.0)]
    assert [source.task_weights for source in sources] == [(0.6, 0.3, 0.1), (0.5, 0.5, 0.0)]


def test_sources_that_do_not_go_together_are_refused(config: DataConfig, tmp_path: Path) -> None:
    codec = PatchCodec(image_size=32, patch_size=8)
    make_shapes(tmp_path / "own", codec=codec, train=9, validation=2, vocab_size=380, log=lambda _: None)
    own = replace(config, sources={**config.sources, "own": SourceConfig(path=str(tmp_path / "own"))})
    with pytest.raises(ValueError, match=r"own was made with the tokenizer \w{16}..., but .*shapes is \w{16}..."):
        DataSource(own)


def test_an_index_that_does_not_fit_its_samples_is_found(config: DataConfig, tmp_path: Path, directory: Path) -> None:
    write_talks(tmp_path / "talks", tokenizer=directory / "shapes", codec=CODEC)
    column = tmp_path / "talks" / "index" / "text_tokens.npy"
    index = Index.load(tmp_path / "talks")
    wrong = index.text_tokens + 1
    with column.open("r+b") as file:
        file.seek(column.stat().st_size - wrong.nbytes)
        file.write(wrong.tobytes())
    talks = replace(config.sources["talks"], path=str(tmp_path / "talks"))
    stale = replace(config, sources={"talks": talks}, tokenizer=str(directory / "shapes"))
    with pytest.raises(ValueError, match=r"has a text of \d+ tokens, the index says \d+: `python tools/prepare_data.py index"):
        next(iter(loader(stale)))


def test_flipped_pictures(directory: Path, config: DataConfig) -> None:
    both = [loader(replace(config, horizontal_flip=share, caption_dropout=0.0)) for share in (0.0, 1.0)]
    plain, flipped = (next(iter(each)) for each in both)
    decode = both[0].source.codec.decode
    images = [decode(batch.latents_MNC.numpy()) for batch in (plain, flipped)]
    assert (images[0][:, :, ::-1] == images[1]).all()
    assert not (images[0] == images[1]).all()
    assert list(rows(plain)) != list(rows(flipped))
