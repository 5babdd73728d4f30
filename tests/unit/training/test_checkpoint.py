"""Which checkpoint a run goes on from, and what becomes of weights that are taken alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mmar_megatron.config import CheckpointConfig
from mmar_megatron.data.batch import Batch
from mmar_megatron.data.stream import StreamState
from mmar_megatron.data.tokenizer import Tokenizer
from mmar_megatron.parallel import ParallelGroups
from mmar_megatron.training import checkpoint
from mmar_megatron.training.checkpoint import Progress
from mmar_megatron.training.saving import CheckpointWriter
from tests.unit.tiny import Documents, engine_of, weights

AVERAGED = "--optimizer.ema_decay=0.9"


@pytest.fixture
def batch(coarse_tokenizer: Tokenizer) -> Batch:
    return Documents(coarse_tokenizer).mixed_batch()


def writer_of(run_dir: Path, *, groups: ParallelGroups) -> CheckpointWriter:
    return CheckpointWriter(CheckpointConfig(), run_dir=run_dir, config_yaml="seed: 1\n", groups=groups, say=print)


@pytest.fixture
def run_dir(tmp_path: Path, groups: ParallelGroups) -> Path:
    """Of a run that saved at steps 1, 2 and 3."""
    engine, writer = engine_of(groups), writer_of(tmp_path, groups=groups)
    for step in (1, 2, 3):
        writer.save(engine, progress=progress_at(step))
    writer.close()
    return tmp_path


def progress_at(step: int) -> Progress:
    return Progress(step=step, stream=StreamState(row=8 * step, places={"text": 3, "pairs": 5}, plan="p", documents=8 * step))


def at(run_dir: Path, step: int) -> Path:
    return checkpoint.directory(run_dir, step=step)


def delete(files: list[Path]) -> None:
    for file in files:
        file.unlink()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "half": lambda path: delete(sorted(path.iterdir())[:4]),
    "empty": lambda path: delete(list(path.iterdir())),
    "manifest": lambda path: (path / "manifest.json").write_text(""),
    "tensors": lambda path: (path / "__0_0.distcp").write_bytes(b"0" * (path / "__0_0.distcp").stat().st_size),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_newest_good_one_is_found_and_damaged_ones_stay(damage: str, run_dir: Path, groups: ParallelGroups) -> None:
    for step in (2, 3):
        DAMAGES[damage](at(run_dir, step))
    left = {path.name: path.stat().st_size for path in at(run_dir, 3).iterdir()}
    said: list[str] = []
    assert checkpoint.newest_good(run_dir, groups=groups, set_aside=True, say=said.append) == at(run_dir, 1)
    assert [str(at(run_dir, step)) in line and "is damaged: " in line for step, line in zip((3, 2), said, strict=True)] == [
        True
    ] * 2
    assert {path.name: path.stat().st_size for path in Path(f"{at(run_dir, 3)}.damaged").iterdir()} == left
    said.clear()
    assert checkpoint.newest_good(run_dir, groups=groups, set_aside=True, say=said.append) == at(run_dir, 1)
    assert said == []  # what was set aside is not read again


def test_looking_changes_nothing(run_dir: Path) -> None:
    (at(run_dir, 3) / "common.pt").unlink()
    assert checkpoint.resolve(run_dir) == at(run_dir, 2)
    assert at(run_dir, 3).is_dir()


def test_the_same_step_may_be_set_aside_again(run_dir: Path, groups: ParallelGroups) -> None:
    for _ in range(2):
        DAMAGES["manifest"](at(run_dir, 3))
        assert checkpoint.newest_good(run_dir, groups=groups, set_aside=True) == at(run_dir, 2)
        writer = writer_of(run_dir, groups=groups)
        writer.save(engine_of(groups), progress=Progress(step=3))
        writer.close()
    names = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert names == ["step_00000001", "step_00000002", "step_00000003", "step_00000003.damaged", "step_00000003.damaged-2"]


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(run_dir: Path, groups: ParallelGroups) -> None:
    for step in (1, 2, 3):
        DAMAGES["manifest"](at(run_dir, step))
    for _ in range(2):  # also after they were set aside
        with pytest.raises(
            ValueError, match=r"No checkpoint in .* is good, so the run cannot go on: bring one back, or begin in"
        ):
            checkpoint.newest_good(run_dir, groups=groups, set_aside=True)


def test_a_run_that_never_saved_begins(tmp_path: Path, groups: ParallelGroups) -> None:
    assert checkpoint.newest_good(tmp_path, groups=groups, set_aside=True) is None
    (tmp_path / "checkpoints" / ".step_00000004.0123abcd.partial").mkdir(parents=True)
    assert checkpoint.newest_good(tmp_path, groups=groups, set_aside=True) is None
    with pytest.raises(ValueError, match="There is no checkpoint at"):
        checkpoint.resolve(tmp_path)


def test_a_damaged_one_that_was_asked_for_is_refused(run_dir: Path) -> None:
    DAMAGES["tensors"](at(run_dir, 3))
    with pytest.raises(ValueError, match=r"step_00000003 is damaged \(__0_0\.distcp has other content.*\): give another one"):
        checkpoint.resolve(at(run_dir, 3))
    assert checkpoint.resolve(at(run_dir, 2)) == at(run_dir, 2)


def test_a_copy_under_any_name_is_one(run_dir: Path) -> None:
    copy = at(run_dir, 3).rename(run_dir / "the best")
    assert checkpoint.resolve(copy) == copy


# --- going on -------------------------------------------------------------------------------------------------------------------


def test_progress_comes_back(run_dir: Path, groups: ParallelGroups) -> None:
    assert checkpoint.load(engine_of(groups), at(run_dir, 2), groups=groups) == progress_at(2)


def test_changed_options_are_named(run_dir: Path) -> None:
    assert checkpoint.changed_options(at(run_dir, 1), "seed: 1\n") == []
    changed = checkpoint.changed_options(at(run_dir, 1), "seed: 2\ntrain: {steps: 5}\n")
    assert changed == ["seed: 1 -> 2", "train.steps: None -> 5"]


def test_weights_alone_with_what_is_new_and_what_is_not_used(tmp_path: Path, groups: ParallelGroups) -> None:
    untied = engine_of(groups, "--model.tie_embeddings=false")
    writer = writer_of(tmp_path, groups=groups)
    writer.save(untied, progress=Progress(step=1))
    writer.close()

    aligned = engine_of(groups, "--model.alignment_loss_weight=1", "--model.alignment_features=8")
    before = weights(aligned)
    report = checkpoint.load_weights(aligned, at(tmp_path, 1))
    assert report.new == ("alignment_projector.bias", "alignment_projector.weight")
    assert report.unused == ("output_layer.weight",)
    assert "2 new, which keep their initial values: alignment_projector.bias" in str(report)
    after, source = weights(aligned), weights(untied)
    for name in after:
        assert torch.equal(after[name], before[name] if name in report.new else source[name]), name
    assert len(report.loaded) > 50


def test_weights_of_another_depth_are_refused(run_dir: Path, groups: ParallelGroups) -> None:
    biased = engine_of(groups, "--model.backbone.add_qkv_bias=true")
    with pytest.raises(ValueError, match=r"is of another model: it has no decoder\.layers\..*bias"):
        checkpoint.load_weights(biased, at(run_dir, 1))
    with pytest.raises(ValueError, match=r"holds no average of the weights: train with optimizer\.ema_decay above 0"):
        checkpoint.load_weights(biased, at(run_dir, 1), average=True)


# --- the average of the weights -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_average_follows_its_formula(dtype: str, groups: ParallelGroups, batch: Batch) -> None:
    engine = engine_of(groups, AVERAGED, f"--precision.dtype={dtype}")
    assert engine.average is not None
    parts = engine.optimizer.chained_optimizers
    fp32 = [weight for part in parts for group in part.optimizer.param_groups for weight in group["params"]]
    expected = [weight.detach().double() for weight in fp32]
    for n in range(4):
        engine.train_step([batch], learning_rate=1e-2)
        decay = min(0.9, (1 + n) / (10 + n))
        expected = [decay * e + (1 - decay) * weight.detach().double() for e, weight in zip(expected, fp32, strict=True)]
    for average, e in zip(engine.average._averages, expected, strict=True):
        torch.testing.assert_close(average.double(), e, rtol=1e-6, atol=1e-7)


def test_average_is_saved_and_may_take_the_weights_place(tmp_path: Path, groups: ParallelGroups, batch: Batch) -> None:
    engine = engine_of(groups, AVERAGED)
    for _ in range(3):
        engine.train_step([batch], learning_rate=1e-2)
    writer = writer_of(tmp_path, groups=groups)
    writer.save(engine, progress=Progress(step=3))
    writer.close()
    assert engine.average is not None
    expected = {name: engine.average.whole()[p] for name, p in engine.chunks[0].module.named_parameters()}

    resumed = engine_of(groups, AVERAGED)
    checkpoint.load(resumed, at(tmp_path, 3), groups=groups)
    assert resumed.average is not None
    assert resumed.average.updates == 3
    whole = resumed.average.whole()
    assert all(torch.equal(whole[p], expected[name]) for name, p in resumed.chunks[0].module.named_parameters())

    of_average = engine_of(groups)
    report = checkpoint.load_weights(of_average, at(tmp_path, 3), average=True)
    assert (report.new, report.unused) == ((), ())
    taken = weights(of_average)
    assert all(torch.equal(taken[name], expected[name]) for name in expected)
    assert not torch.equal(taken["post_projector.0.weight"], weights(engine)["post_projector.0.weight"])


def test_average_begins_with_the_weights_that_are_loaded_without_one(run_dir: Path, groups: ParallelGroups, batch: Batch) -> None:
    engine = engine_of(groups, AVERAGED)
    engine.train_step([batch], learning_rate=1e-2)  # away from what is loaded
    checkpoint.load(engine, at(run_dir, 2), groups=groups)
    assert engine.average is not None
    whole = engine.average.whole()
    assert engine.average.updates == 0
    assert all(torch.equal(average, p) for p, average in whole.items())
