from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mmar_megatron.config import CodecConfig, DataConfig, MaskRatioConfig, SourceConfig, TaskConfig
from mmar_megatron.data import loader as loader_module
from mmar_megatron.data.batch import IGNORE, Batch
from mmar_megatron.data.codec import PatchCodec
from mmar_megatron.data.held_out import HeldOut, ValidationLoader
from mmar_megatron.data.index import Split
from mmar_megatron.data.loader import TrainLoader
from mmar_megatron.data.prepare import Record, ensure_data, write_dataset
from mmar_megatron.data.shards import Sample
from mmar_megatron.data.source import DataSource
from mmar_megatron.data.stream import StreamState
from mmar_megatron.data.tokenizer import train_sentencepiece
from tests.unit.data.conftest import TRAIN, VALIDATION
from tests.unit.data.damage import damage_image

R = 3


def train_loader(config: DataConfig, **overrides: Any) -> TrainLoader:
    defaults = {"seed": 5, "timestep_multiplier": R, "micro_batch_size": 2, "global_batch_size": 8}
    return TrainLoader(DataSource(config), **{**defaults, **overrides})


def validation_loader(config: DataConfig, **overrides: Any) -> ValidationLoader:
    defaults = {
        "seed": 5,
        "timesteps": R,
        "mask_ratios": [0.5, 1.0],
        "samples": 10,
        "micro_batch_size": 4,
        "task": "text_to_image",
    }
    return ValidationLoader(HeldOut(DataSource(config)), **{**defaults, **overrides})


def rows(batch: Batch) -> Iterator[tuple[bytes, ...]]:
    """All that each row holds, in a form that can be compared and counted."""
    length = batch.tokens_BS.shape[1]
    of_row_M = batch.image_positions_MN[:, 0] // length
    occupied_M = (batch.visible_MN | batch.masked_MN).any(dim=1)
    ids_BK = batch.sample_ids_BK
    relative = vars(batch) | {"image_positions_MN": batch.image_positions_MN % length}
    for name in (
        "sample_ids_BK",
        "labelled_L",
        "masked_P",
        "aligned_V",
        "causal",
    ):  # ids come below, the rest follows from labels, masks and ids of documents and spans
        del relative[name]
    for b in range(len(batch.tokens_BS)):
        own = (of_row_M == b) & occupied_M
        tensors = [tensor[b] if name.endswith("_BS") else tensor[own] for name, tensor in relative.items() if tensor is not None]
        tensors.append(ids_BK[b][ids_BK[b] >= 0])
        yield tuple(tensor.numpy().tobytes() for tensor in tensors)


def all_rows(batches: Iterator[Batch] | list[Batch]) -> list[tuple[bytes, ...]]:
    return [row for batch in batches for row in rows(batch)]


def task_of(batch: Batch, b: int, source: DataSource) -> str:
    if (batch.labels_BS[b] != IGNORE).any():
        return "image_to_text"
    return "image_only" if batch.tokens_BS[b, 1] == source.tokenizer.begin_image_id else "text_to_image"


@pytest.mark.parametrize("ranks", [2, 4])
def test_each_step_has_the_same_rows_at_any_number_of_ranks(config: DataConfig, ranks: int) -> None:
    one = iter(train_loader(config))
    many = [iter(train_loader(config, data_parallel_rank=r, data_parallel_size=ranks)) for r in range(ranks)]
    for _ in range(10):
        expected = all_rows(islice(one, 4))
        found = all_rows([batch for loader in many for batch in islice(loader, 4 // ranks)])
        assert Counter(found) == Counter(expected)


def test_micro_batch_size_does_not_change_a_step(config: DataConfig) -> None:
    small, large = (all_rows(islice(train_loader(config, micro_batch_size=b), 16 // b)) for b in (1, 4))
    assert small == large


def test_ranks_take_turns_at_the_microbatches_of_a_step(config: DataConfig) -> None:
    one = all_rows(islice(train_loader(config), 8))
    halves = [list(islice(train_loader(config, data_parallel_rank=r, data_parallel_size=2), 4)) for r in range(2)]
    assert all_rows([batch for both in zip(*halves, strict=True) for batch in both]) == one


def test_resumes_from_one_integer(config: DataConfig) -> None:
    uninterrupted = all_rows(islice(train_loader(config), 60))
    resumed = all_rows(islice(train_loader(config, state=StreamState(row=7 * 8)), 60 - 7 * 4))
    assert resumed == uninterrupted[7 * 8 :]


def test_the_state_is_that_after_the_step_of_the_batch_at_hand(config: DataConfig) -> None:
    loader = train_loader(config)
    assert [loader.state.row for _ in islice(loader, 9)] == [8] * 4 + [16] * 4 + [24]


def test_workers_change_nothing_not_even_the_global_random_state(config: DataConfig) -> None:
    state = torch.get_rng_state()
    in_process, in_workers = (all_rows(islice(train_loader(replace(config, num_workers=w)), 30)) for w in (0, 2))
    assert in_workers == in_process
    assert torch.equal(torch.get_rng_state(), state)


def test_each_epoch_has_each_sample_once_in_another_order(config: DataConfig) -> None:
    loader = train_loader(config, micro_batch_size=4, global_batch_size=4)
    ids = [i for batch in islice(loader, 3 * TRAIN // 4) for i in batch.sample_ids_BK[:, 0].tolist()]
    epochs = [ids[e * TRAIN : (e + 1) * TRAIN] for e in range(3)]
    assert all(sorted(epoch) == list(range(TRAIN)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_all_randomness_is_new_in_each_epoch_and_for_each_seed(config: DataConfig) -> None:
    only_images = replace(config, tasks=TaskConfig(text_to_image=1, image_to_text=0, image_only=0))
    first, second = (
        {int(i): noise for batch in batches for i, noise in zip(batch.sample_ids_BK[:, 0], batch.noise_MNRC, strict=True)}
        for loader in [iter(train_loader(only_images))]
        for batches in (list(islice(loader, TRAIN // 2)), list(islice(loader, TRAIN // 2)))
    )
    assert all(not torch.equal(first[i], second[i]) for i in range(TRAIN))
    other = next(iter(train_loader(only_images, seed=6)))
    assert not torch.equal(other.noise_MNRC[0], first[int(other.sample_ids_BK[0, 0])])


def test_the_same_samples_in_two_sources_have_each_their_own_noise(config: DataConfig) -> None:
    sources = {name: SourceConfig(path=config.path) for name in ("one", "other")}
    tasks = TaskConfig(text_to_image=1, image_to_text=0)
    batches = islice(train_loader(replace(config, sources=sources, tasks=tasks)), TRAIN // 2)
    noise = {int(i): noise for b in batches for i, noise in zip(b.sample_ids_BK[:, 0], b.noise_MNRC, strict=True)}
    both = [(noise[i], noise[other]) for i in range(TRAIN) if i in noise and (other := i + TRAIN + VALIDATION) in noise]
    assert both
    assert all(not torch.equal(one, other) for one, other in both)


def test_every_step_has_nearly_the_configured_tasks(config: DataConfig) -> None:
    tasks = TaskConfig(text_to_image=0.5, image_to_text=0.25, image_only=0.25)
    loader = train_loader(replace(config, tasks=tasks, caption_dropout=0), micro_batch_size=16, global_batch_size=16)
    for batch in islice(loader, 20):
        counts = Counter(task_of(batch, b, loader.source) for b in range(16))
        assert abs(counts["text_to_image"] - 8) <= 2
        assert abs(counts["image_to_text"] - 4) <= 2
        assert abs(counts["image_only"] - 4) <= 2


def test_dropped_captions_leave_the_image_only(config: DataConfig) -> None:
    tasks = TaskConfig(text_to_image=1, image_to_text=0)
    loader = train_loader(replace(config, tasks=tasks, caption_dropout=0.25), micro_batch_size=8)
    found = Counter(task_of(batch, b, loader.source) for batch in islice(loader, 100) for b in range(8))
    assert found.keys() == {"text_to_image", "image_only"}
    assert 0.2 < found["image_only"] / 800 < 0.3


def test_rows_hold_the_samples_text_and_image(config: DataConfig) -> None:
    loader = train_loader(replace(config, caption_dropout=0), micro_batch_size=8)
    source, reader = loader.source, loader.source.reader("train")
    for batch in islice(loader, 5):
        for b, sample_id in enumerate(batch.sample_ids_BK[:, 0].tolist()):
            sample = reader.read(sample_id)
            assert source.tokenizer.decode(batch.tokens_BS[b].tolist()) == sample.captions["en"][0]
            assert (source.codec.decode(batch.latents_MNC[b].numpy()) == sample.image_HW3).all()
            masked = int(batch.masked_MN[b].sum())
            assert masked == 0 if task_of(batch, b, source) == "image_to_text" else 45 <= masked <= 64


def test_mask_ratio_follows_the_configuration(config: DataConfig) -> None:
    tasks, ratio = TaskConfig(text_to_image=1, image_to_text=0), MaskRatioConfig(distribution="uniform", minimum=0)
    batches = list(islice(train_loader(replace(config, tasks=tasks, mask_ratio=ratio)), 100))
    masked = torch.cat([batch.masked_MN.sum(dim=1) for batch in batches])
    assert (masked.min() >= 1, masked.min() < 8, masked.max() > 56) == (True, True, True)
    noise, levels = (torch.cat([getattr(b, name) for b in batches]) for name in ("noise_MNRC", "timesteps_MNR"))
    torch.testing.assert_close(torch.stack([noise.mean(), noise.std()]), torch.tensor([0.0, 1.0]), atol=0.01, rtol=0)
    torch.testing.assert_close(torch.stack([levels.mean(), levels.std()]), torch.tensor([0.5, 12**-0.5]), atol=0.01, rtol=0)


def test_batch_sizes_must_divide(config: DataConfig) -> None:
    with pytest.raises(ValueError, match="global_batch_size 8 is not a multiple of micro_batch_size 3 x 2"):
        train_loader(config, micro_batch_size=3, data_parallel_size=2)
    with pytest.raises(ValueError, match="global_batch_size 8 is not a multiple of micro_batch_size 4 x 4"):
        train_loader(config, micro_batch_size=4, data_parallel_size=4)


def test_long_captions_are_cut_and_counted(config: DataConfig) -> None:
    loader = train_loader(
        replace(config, sequence_length=64 + 4 + 16, caption_dropout=0), micro_batch_size=TRAIN, global_batch_size=TRAIN
    )
    source = loader.source
    next(iter(loader))
    lengths = source.sets[0].index.text_tokens[:TRAIN]
    assert loader.counts["data"].truncated == (lengths > 16).sum() > 0


def test_bad_samples_are_counted_and_left_out_alike_at_any_layout(shapes_copy: Path, config: DataConfig) -> None:
    for number in (3, 4, 40):
        damage_image(shapes_copy, split="train", number=number)
    damaged = replace(config, path=str(shapes_copy), max_bad_fraction=0.2)
    loaders = [train_loader(damaged), train_loader(replace(damaged, num_workers=2))]
    loaders += [train_loader(damaged, data_parallel_rank=r, data_parallel_size=2) for r in range(2)]
    one, workers, *halves = (all_rows(islice(loader, n)) for loader, n in zip(loaders, (60, 60, 30, 30), strict=True))
    assert one == workers
    assert Counter(halves[0] + halves[1]) == Counter(one)
    # Two epochs of 60 samples.
    assert [loader.counts["data"].skipped for loader in loaders[:2]] == [6, 6]
    assert sum(loader.counts["data"].skipped for loader in loaders[2:]) == 6
    assert [loader.counts["data"].read for loader in loaders] == [120, 120, 60, 60]
    assert all("shard" in (loader.last_problem or "") for loader in loaders)


def test_too_many_bad_images(shapes_copy: Path, config: DataConfig) -> None:
    for number in range(0, TRAIN, 4):
        damage_image(shapes_copy, split="train", number=number)
    damaged = replace(config, path=str(shapes_copy), max_bad_fraction=0.1)
    with pytest.raises(
        ValueError,
        match=r"7 samples could not .* \(7 of data; the last one: shard .*\), which is more than data.max_bad_fraction = 0.1",
    ):
        list(islice(train_loader(damaged, micro_batch_size=1, global_batch_size=1), TRAIN))


def test_other_tokenizer_names_both(config: DataConfig, tmp_path: Path) -> None:
    other = tmp_path / "other.model"
    other.write_bytes(train_sentencepiece(["something else altogether"] * 10, vocab_size=300))
    with pytest.raises(ValueError, match=r"made with the tokenizer [0-9a-f]{16}\.\.\., but .*other.model is [0-9a-f]{16}\.\.\."):
        DataSource(replace(config, tokenizer=str(other)))


def test_other_codec_names_both(config: DataConfig) -> None:
    with pytest.raises(
        ValueError, match=r"codec \(patch, image_size 32, patch_size 4\), data.codec is \(patch, .* patch_size 8\)"
    ):
        DataSource(replace(config, codec=CodecConfig(patch_size=8)))


def test_other_languages(config: DataConfig) -> None:
    with pytest.raises(ValueError, match=r"has captions in \['en'\], but data.languages is \['zh'\]"):
        DataSource(replace(config, languages=["zh"]))


def test_missing_split(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no validation samples"):
        validation_loader(write_gray(tmp_path / "gray", {"train": ["aa bb"]}))


@pytest.mark.parametrize("task", ["text_to_image", "image_to_text"])
def test_validation_is_the_same_at_any_layout(config: DataConfig, task: str) -> None:
    one = all_rows(iter(validation_loader(config, task=task)))
    halves = [
        validation_loader(config, task=task, micro_batch_size=3, data_parallel_rank=r, data_parallel_size=2) for r in range(2)
    ]
    assert [len(half) for half in halves] == [2, 2]
    batches = [batch for half in halves for batch in half]
    assert all(len(batch.tokens_BS) == 3 for batch in batches)
    assert Counter(all_rows(batches)) == Counter(one)
    ids = sorted(i for batch in batches for i in batch.sample_ids_BK[:, 0].tolist())
    assert ids == [-1, -1, *(TRAIN + i * VALIDATION // 10 for i in range(10))]


def test_validation_grid(config: DataConfig) -> None:
    batches = list(validation_loader(config))
    masked = [int(n) for batch in batches for n in batch.masked_MN.sum(dim=1)]
    assert masked == [32, 64] * 5
    assert batches[0].timesteps_MNR[0, 7].tolist() == pytest.approx([1 / 6, 3 / 6, 5 / 6])
    assert all_rows(batches) == all_rows(iter(validation_loader(config)))
    assert all_rows(batches) != all_rows(iter(validation_loader(config, seed=6)))


def test_validation_reads_at_most_the_split(config: DataConfig) -> None:
    ids = [i for batch in validation_loader(config, samples=1000) for i in batch.sample_ids_BK[:, 0].tolist()]
    assert ids == [*range(TRAIN, TRAIN + VALIDATION), -1, -1]


def test_wrong_condition_changes_the_condition_alone(config: DataConfig) -> None:
    def pairs(task: str) -> Iterator[tuple[Batch, Batch]]:
        loaders = (validation_loader(config, task=task, micro_batch_size=1, wrong_condition=wrong) for wrong in (False, True))
        return zip(*loaders, strict=True)

    for right, wrong in pairs("text_to_image"):
        for name in ("latents_MNC", "masked_MN", "timesteps_MNR", "noise_MNRC", "sample_ids_BK"):
            assert torch.equal(getattr(right, name), getattr(wrong, name))
        assert not torch.equal(right.tokens_BS, wrong.tokens_BS)
    for right, wrong in pairs("image_to_text"):
        for name in ("tokens_BS", "labels_BS", "sample_ids_BK"):
            assert torch.equal(getattr(right, name), getattr(wrong, name))
        assert not torch.equal(right.latents_MNC, wrong.latents_MNC)


def write_gray(
    out: Path, captions: dict[Split, Sequence[str | dict[str, list[str]]]], *, tokenizer: str | None = None
) -> DataConfig:
    """A data set of gray pictures with these captions, in English or by language."""
    records = [
        Record(
            key=f"{split}{number}",
            split=split,
            captions=text if isinstance(text, dict) else {"en": [text]},
            image=lambda number=number: np.full((32, 32, 3), number, np.uint8),  # type: ignore[misc]
        )
        for split, texts in captions.items()
        for number, text in enumerate(texts)
    ]
    codec = PatchCodec(image_size=32, patch_size=4)
    write_dataset(out, records=records, codec=codec, made_by={}, tokenizer=tokenizer, vocab_size=270, log=lambda _: None)
    return DataConfig(path=str(out), num_workers=0)


def test_wrong_condition_has_another_caption_even_among_many_alike(tmp_path: Path) -> None:
    config = write_gray(tmp_path / "gray", {"train": ["aa bb"], "validation": ["aa", "aa", "aa", "bb", "aa", "aa"]})
    batch = next(iter(validation_loader(config, micro_batch_size=6, wrong_condition=True)))
    decode = DataSource(config).tokenizer.decode
    assert [decode(tokens) for tokens in batch.tokens_BS.tolist()] == ["bb", "bb", "bb", "aa", "bb", "bb"]

    alike = write_gray(tmp_path / "alike", {"train": ["aa bb"], "validation": ["aa", "aa"]})
    with pytest.raises(ValueError, match=r"have the caption 'aa', so that none can be wrong: .* set validation.every to 0"):
        next(iter(validation_loader(alike, wrong_condition=True)))


def test_data_are_made_on_first_use_and_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ensure_data(DataConfig(path=str(tmp_path / "not-to-be-generated")))
    assert list(tmp_path.iterdir()) == []
    config = DataConfig(path=str(tmp_path / "shapes"), generate="shapes", num_workers=0)
    ensure_data(config)
    ensure_data(config)
    assert capsys.readouterr().out.count("\n") == 1
    assert len(train_loader(config).source.reader("train")) == 8000


@pytest.mark.parametrize("wrong_condition", [False, True])
@pytest.mark.parametrize("rank", [0, 1])
def test_validation_announces_what_it_reads(
    config: DataConfig, wrong_condition: bool, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = validation_loader(
        config, wrong_condition=wrong_condition, data_parallel_rank=rank, data_parallel_size=2, samples=VALIDATION
    )
    announced: list[int] = []
    read: list[int] = []
    of_reader = loader._held_out._reader.read

    def reading(number: int) -> Sample:
        read.append(number)
        return of_reader(number)

    monkeypatch.setattr(loader._held_out._reader, "read_ahead", announced.extend)
    monkeypatch.setattr(loader._held_out._reader, "read", reading)
    list(loader)
    assert read
    assert set(announced) <= set(read)
    assert not wrong_condition or read[:2] == announced[:2]
    assert wrong_condition or read == announced


@pytest.mark.parametrize("workers", [1, 2])
def test_training_announces_each_sample_once_and_so_far_ahead(
    config: DataConfig, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    microbatches = train_loader(replace(config, read_ahead=3))._microbatches
    announced: list[int] = []
    read: list[int] = []
    of_reader = microbatches.readers[0].read

    def reading(number: int) -> Sample:
        read.append(number)
        return of_reader(number)

    monkeypatch.setattr(loader_module, "get_worker_info", lambda: SimpleNamespace(num_workers=workers))
    monkeypatch.setattr(microbatches.readers[0], "read_ahead", announced.extend)
    monkeypatch.setattr(microbatches.readers[0], "read", reading)
    for k in range(0, 10 * workers, workers):
        microbatches[k]
        assert announced[: len(read)] == read
        assert len(announced) == len(read) + 3 * 2


def test_windows_that_are_consumed_are_forgotten(config: DataConfig) -> None:
    loader = train_loader(replace(config, packing_window=8))
    list(islice(loader, 60))
    assert len(loader._microbatches.stream._windows) <= 3


def test_one_of_the_captions_in_the_configured_languages_is_read(tmp_path: Path) -> None:
    captions = {"de": ["a", "b b b b"], "en": ["c", "d d"], "fr": ["e", "f f f"]}
    config = write_gray(tmp_path / "gray", {"train": [captions, "e e"]})
    loader = train_loader(replace(config, languages=["fr", "en"], caption_dropout=0))
    read = {loader.source.tokenizer.decode(row.tolist()) for batch in islice(loader, 60) for row in batch.tokens_BS}
    assert read == {"c", "d d", "e", "f f f", "e e"}


def test_a_held_out_sample_without_a_configured_language_is_named(tmp_path: Path) -> None:
    config = write_gray(tmp_path / "gray", {"train": ["aa", "bb"], "validation": ["cc", {"de": ["dd"]}]})
    with pytest.raises(ValueError, match=r"sample validation1 has captions in \['de'\], but data.languages is \['en'\]"):
        DataSource(config)


def test_without_training_samples_there_is_no_stream(tmp_path: Path, shapes_dir: Path) -> None:
    tokenizer = str(shapes_dir / "tokenizer.model")
    config = replace(write_gray(tmp_path / "held-out", {"validation": ["aa"]}, tokenizer=tokenizer), tokenizer=tokenizer)
    with pytest.raises(ValueError, match=r"held-out has no train samples: .* or leave the source out"):
        DataSource(config).planner(seed=5)


def test_the_next_sample_stands_for_a_held_out_one_that_is_damaged(shapes_copy: Path, config: DataConfig) -> None:
    for number in (3, VALIDATION - 1):
        damage_image(shapes_copy, split="validation", number=number)
    held_out = HeldOut(DataSource(replace(config, path=str(shapes_copy))))
    assert [held_out.read(place).sample_id - TRAIN for place in (2, 3, 4, VALIDATION - 1)] == [2, 4, 4, 0]


def test_previewed_captions_are_spread_over_the_split(tmp_path: Path) -> None:
    held_out = HeldOut(DataSource(write_gray(tmp_path / "gray", {"train": ["aa"], "validation": list("abcdefgh")})))
    assert held_out.captions(3) == ["a", "c", "f"]
    assert held_out.captions(100) == list("abcdefgh")


def test_held_out_samples_stand_for_all_their_captions_by_turns(tmp_path: Path) -> None:
    config = write_gray(tmp_path / "gray", {"train": ["aa"], "validation": [{"en": ["a", "b"]}] * 4})
    batch = next(iter(validation_loader(config)))
    assert [DataSource(config).tokenizer.decode(tokens) for tokens in batch.tokens_BS.tolist()] == ["b", "a", "b", "a"]


def test_the_wrong_condition_comes_from_far_away(tmp_path: Path) -> None:
    config = write_gray(tmp_path / "gray", {"train": ["aa"], "validation": list("abcdefgh")})
    batch = next(iter(validation_loader(config, samples=8, micro_batch_size=8, wrong_condition=True)))
    assert [DataSource(config).tokenizer.decode(tokens) for tokens in batch.tokens_BS.tolist()] == list("efghabcd")
