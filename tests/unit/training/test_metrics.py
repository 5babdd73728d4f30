"""metrics.jsonl, TensorBoard, rates and the progress line."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mmar_megatron.scaling.flops import Flops, Peaks, StepFlops
from mmar_megatron.training.metrics import MetricsWriter, ProgressLine, Throughput, duration, read_metrics


class Clock:
    """A clock that is set by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def log(run_dir: Path, steps: range, *, resume_step: int | None = None, loss: float = 1.0) -> None:
    writer = MetricsWriter(run_dir, resume_step=resume_step, enabled=True)
    for step in steps:
        writer.write({"loss": loss / 3, "mfu": None}, step=step)
    writer.close()


def board(run_dir: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(run_dir / "tensorboard"))
    accumulator.Reload()
    return accumulator


def test_each_line_is_on_disk_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "run", resume_step=None, enabled=True)
    for step in (10, 20):
        writer.write({"loss": 0.1, "lr": 1e-3, "mfu": None}, step=step)
        lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        assert json.loads(lines[-1]) == {"step": step, "loss": 0.1, "lr": 1e-3, "mfu": None}
    assert len(lines) == 2
    writer.close()


def test_tensorboard_has_the_same_scalars_details_and_images(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, resume_step=None, enabled=True)
    writer.write({"loss": 0.5, "mfu": None}, step=3)
    writer.scalars({"loss_image/mask_ratio_0.75": 0.25}, step=3)
    picture_HW3 = np.zeros((4, 6, 3), dtype=np.uint8)
    writer.image("samples", picture_HW3, step=3)
    writer.close()
    events = board(tmp_path)
    assert set(events.Tags()["scalars"]) == {"loss", "loss_image/mask_ratio_0.75"}
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(3, 0.5)]
    (image,) = events.Images("samples")
    assert (image.step, image.width, image.height) == (3, 6, 4)


def test_after_a_resume_each_step_stands_once(tmp_path: Path) -> None:
    log(tmp_path, range(1, 8), loss=1.0)
    time.sleep(1.1 - time.time() % 1)  # TensorBoard tells files of one process apart by the second
    log(tmp_path, range(5, 11), resume_step=4, loss=2.0)
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert [row["loss"] for row in rows] == [1.0 / 3] * 4 + [2.0 / 3] * 6  # kept to the last digit
    events = board(tmp_path).Scalars("loss")
    assert [event.step for event in events] == list(range(1, 11))
    assert [event.value for event in events] == pytest.approx([1.0 / 3] * 4 + [2.0 / 3] * 6)


def test_a_fresh_start_drops_what_was_logged(tmp_path: Path) -> None:
    log(tmp_path, range(0, 5))
    log(tmp_path, range(0, 2))
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1]


def test_a_torn_last_line_is_dropped(tmp_path: Path) -> None:
    log(tmp_path, range(1, 4))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "los')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
    log(tmp_path, range(4, 6), resume_step=3)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]


def test_a_broken_line_elsewhere_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2"):
        read_metrics(tmp_path)


def test_a_run_without_metrics_has_no_rows(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []


def test_not_finite_is_null_in_json_and_itself_in_tensorboard(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, resume_step=None, enabled=True)
    writer.write({"loss": math.nan, "grad_norm": math.inf}, step=1)
    writer.close()
    assert read_metrics(tmp_path) == [{"step": 1, "loss": None, "grad_norm": None}]
    (event,) = board(tmp_path).Scalars("loss")
    assert math.isnan(event.value)


def test_a_step_is_not_logged_twice(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, resume_step=5, enabled=True)
    with pytest.raises(AssertionError):
        writer.write({"loss": 1.0}, step=5)
    writer.close()


def test_a_disabled_writer_writes_nothing(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "run", resume_step=None, enabled=False)
    writer.write({"loss": 1.0}, step=1)
    writer.scalars({"loss": 1.0}, step=1)
    writer.image("samples", np.zeros((2, 2, 3), dtype=np.uint8), step=1)
    writer.close()
    assert not (tmp_path / "run").exists()


def operations(model: int, *, recompute: int) -> StepFlops:
    none = Flops(0, 0)
    return StepFlops(
        backbone=Flops(model, 0),
        attention=none,
        embedding_vit=none,
        vis_projector=none,
        post_projector=none,
        logits=none,
        head=none,
        recompute=recompute,
    )


def test_throughput_is_averaged_over_the_window_without_pauses() -> None:
    clock = Clock()
    throughput = Throughput(num_devices=2, peaks=Peaks(dtype=1e12), clock=clock)
    for _ in range(2):
        clock.now += 1.0
        throughput.count(steps=2, samples=16, tokens=2048, flops=operations(2 * 10**12, recompute=10**12))
    with throughput.paused():
        clock.now += 100.0
    rates = throughput.report()
    assert rates == pytest.approx(
        {
            "step_time_s": 0.5,
            "samples_per_second": 16,
            "tokens_per_second": 2048,
            "tflops_per_device": 1.0,
            "mfu": 1.0,
            "hfu": 1.5,
        }
    )
    clock.now += 3.0
    throughput.count(steps=1, samples=6, tokens=768, flops=operations(6 * 10**12, recompute=0))
    assert throughput.report() == pytest.approx(
        {"step_time_s": 3.0, "samples_per_second": 2, "tokens_per_second": 256, "tflops_per_device": 1.0, "mfu": 1.0, "hfu": 1.0}
    )


def test_mfu_is_unknown_without_a_peak() -> None:
    clock = Clock()
    throughput = Throughput(num_devices=1, peaks=None, clock=clock)
    clock.now = 1.0
    throughput.count(steps=1, samples=1, tokens=1, flops=operations(1, recompute=1))
    rates = throughput.report()
    assert (rates["mfu"], rates["hfu"]) == (None, None)


def test_progress_line() -> None:
    clock = Clock()
    progress = ProgressLine(first_step=100, total_steps=1600, clock=clock)
    clock.now = 20.0  # 20 steps done in this process, 1,480 to go
    metrics = {"loss": 1.23456, "loss_text": 1.0, "loss_image": None, "grad_norm": 0.5, "lr": 1e-3, "samples_per_second": 135.2}
    line = progress.line(metrics | {"tokens_per_second": 12345.6}, step=120)
    expected = "step  120/1600  loss 1.2346  text 1.0000  grad 0.50  lr 1.0e-03  135 samples/s  12.3k tokens/s  left 24m40s"
    assert line == expected
    line = progress.line(metrics | {"val_loss_text": 0.1, "val_loss_image": 0.05}, step=120)
    assert line.endswith("left 24m40s  held out: text 0.1000  image 0.0500")


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0s"), (42, "42s"), (312, "5m12s"), (11100, "3h05m"), (187500, "2d04h")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
