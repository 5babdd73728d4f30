"""What a run reports: `metrics.jsonl`, TensorBoard, and one readable line for each logged step.

`metrics.jsonl` holds one JSON object per logged step, in rising order of `step`, each step once, also after a resume.
JSON has no NaN or infinity: a value that is not finite is written as null (TensorBoard gets it as it is), and so is a value
that is not known (`mfu` and `hfu` where the device's peak is not in our table).
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmar_megatron.scaling.flops import Peaks, StepFlops

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

METRICS_FILE = "metrics.jsonl"

Metrics = Mapping[str, float | None]

CLOCKED = frozenset(
    {
        *("step_time_s", "samples_per_second", "tokens_per_second", "tflops_per_device", "mfu", "hfu"),
        *("rank_time_mean_s", "rank_time_max_s", "slowest_rank", "data_wait_share"),
    }
)
"""Columns that a clock decides. All others are the same, to the last printed digit, however often a run was interrupted."""


def read_metrics(run_dir: Path | str) -> list[dict[str, Any]]:
    """The logged steps of a run, as `read_rows` reads them."""
    return read_rows(Path(run_dir) / METRICS_FILE)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """A file of one JSON object for each of some steps, in order; an empty list where there is no such file.

    A last line that was cut off (the machine died while writing it) is left out. Raises ValueError, naming the line, where any
    other line is not a JSON object with a step.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            row["step"] = int(row["step"])
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number} is not a logged step: remove that line to read the others.") from error
        rows.append(row)
    return rows


class MetricsWriter:
    """Appends logged steps to `RUN_DIR/metrics.jsonl` and `RUN_DIR/tensorboard/`; each line is flushed as it is written.

    Args:
        run_dir: The run's directory, made if it is missing.
        resume_step: Step of the checkpoint that is continued; what was logged after it is dropped, at once and atomically.
            None: the run starts afresh, and all that was logged is dropped.
        enabled: False on all ranks but one: every method then does nothing.
    """

    def __init__(self, run_dir: Path | str, *, resume_step: int | None, enabled: bool) -> None:
        self._board: SummaryWriter | None = None
        if not enabled:
            return
        # Imported here, because it takes seconds, and ranks that write nothing and readers of metrics.jsonl need none of it.
        from torch.utils.tensorboard import SummaryWriter

        run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        self._last_step = -1 if resume_step is None else resume_step
        self._path = run_dir / METRICS_FILE
        keep_until(self._path, self._last_step)
        self._file = self._path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=self._last_step + 1)

    def write(self, metrics: Metrics, *, step: int) -> None:
        """Logs everything known of one step, which must be later than any logged before."""
        if self._board is None:
            return
        assert step > self._last_step, f"step {step} is logged after step {self._last_step}"
        self._last_step = step
        self._file.write(json.dumps({"step": step, **finite_or_none(metrics)}, allow_nan=False) + "\n")
        self._file.flush()
        self.scalars(metrics, step=step)

    def amend(self, metrics: Metrics, *, step: int) -> None:
        """Adds what was not known of the last logged step when it was logged; if interrupted, nothing."""
        if self._board is None:
            return
        rows = {row["step"]: row for row in read_rows(self._path)}
        rows[step] = rows.get(step, {"step": step}) | finite_or_none(metrics)
        self._file.close()
        _rewrite(self._path, rows.values())
        self._file = self._path.open("a", encoding="utf-8")
        self.scalars(metrics, step=step)

    def sync(self) -> None:
        """Has all rows on the disk: before a checkpoint is saved, that a machine which dies cannot lose what led to it."""
        if self._board is not None:
            os.fsync(self._file.fileno())

    def scalars(self, values: Metrics, *, step: int) -> None:
        """To TensorBoard alone: details such as the loss by mask ratio. A value of None is left out."""
        if self._board is None:
            return
        for name, value in values.items():
            if value is not None:
                self._board.add_scalar(name, value, step)
        self._board.flush()

    def image(self, name: str, image_HW3: np.ndarray, *, step: int) -> None:
        """To TensorBoard alone: a picture, uint8."""
        if self._board is not None:
            self._board.add_image(name, image_HW3, step, dataformats="HWC")
            self._board.flush()

    def close(self) -> None:
        """Ends writing."""
        if self._board is not None:
            self._board.close()
            self._file.close()


def finite_or_none(values: Metrics) -> dict[str, float | None]:
    """As JSON can say it."""
    return {name: value if value is not None and math.isfinite(value) else None for name, value in values.items()}


def keep_until(path: Path, last_step: int) -> None:
    """Drops from a file of rows what was logged after `last_step`, and a torn last line; if interrupted, nothing."""
    if not path.exists():
        return
    _rewrite(path, [row for row in read_rows(path) if row["step"] <= last_step])


def _rewrite(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    partial = path.with_suffix(".jsonl.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


class Throughput:
    """Rates over the steps since the last report, without the time spent in validation, previews and checkpoints.

    Args:
        num_devices: Over which the floating-point operations of a step are spread.
        peaks: Of a device; None where they are not known.
        clock: Seconds, rising.
    """

    def __init__(self, *, num_devices: int, peaks: Peaks | None, clock: Callable[[], float] = time.perf_counter) -> None:
        self._num_devices = num_devices
        self._peaks = peaks
        self._clock = clock
        self._restart()

    def _restart(self) -> None:
        self._steps = self._samples = self._tokens = 0
        self._flops = self._paused_s = 0.0
        self._model_s = self._executed_s = 0.0
        self._start = self._clock()

    def count(self, *, steps: int, samples: int, tokens: int, flops: StepFlops) -> None:
        """Adds optimizer steps: their samples, sequence positions and operations over all devices."""
        self._steps += steps
        self._samples += samples
        self._tokens += tokens
        self._flops += flops.model
        if self._peaks is not None:
            self._model_s += self._peaks.seconds(flops)
            self._executed_s += self._peaks.seconds(flops, executed=True)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent within is not training time."""
        start = self._clock()
        try:
            yield
        finally:
            self._paused_s += self._clock() - start

    def report(self) -> dict[str, Any]:
        """The averages since the last report, by their names in `metrics.jsonl`, and begins the next window."""
        assert self._steps > 0, "a report needs at least one counted step"
        seconds = self._clock() - self._start - self._paused_s
        device_seconds = seconds * self._num_devices
        rates = {
            "step_time_s": seconds / self._steps,
            "samples_per_second": self._samples / seconds,
            "tokens_per_second": self._tokens / seconds,
            "tflops_per_device": self._flops / device_seconds / 1e12,
            "mfu": None if self._peaks is None else self._model_s / device_seconds,
            "hfu": None if self._peaks is None else self._executed_s / device_seconds,
        }
        self._restart()
        return rates


class ProgressLine:
    """One line for each logged step, to be read by a person who waits.

    Args:
        first_step: Steps done before this process started (those of the checkpoint that is continued).
        total_steps: Steps of the whole run.
        clock: Seconds, rising.
    """

    def __init__(self, *, first_step: int, total_steps: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self._first_step = first_step
        self._total_steps = total_steps
        self._clock = clock
        self._start = clock()

    def line(self, metrics: Metrics, *, step: int) -> str:
        """The line: of `metrics`, as they go to `MetricsWriter.write`, what is there; validation only where it ran."""
        parts = [f"step {step:>{len(str(self._total_steps))}}/{self._total_steps}"]
        for name, label, form in _COLUMNS:
            value = metrics.get(name)
            if value is not None:
                parts.append(f"{label} {value:{form}}")
        for name, unit in (("samples_per_second", "samples/s"), ("tokens_per_second", "tokens/s")):
            value = metrics.get(name)
            if value is not None:
                parts.append(f"{_count(value)} {unit}")
        parts.append(f"left {self._time_left(step)}")
        validation = [f"{label} {metrics[name]:.4f}" for name, label in _VALIDATION if metrics.get(name) is not None]
        if validation:
            parts.append("held out: " + "  ".join(validation))
        return "  ".join(parts)

    def _time_left(self, step: int) -> str:
        # Over everything since the start, so that validation, previews and checkpoints to come are counted in.
        done = step - self._first_step
        if done <= 0:
            return "?"
        return duration((self._clock() - self._start) / done * (self._total_steps - step))


_COLUMNS = (
    ("loss", "loss", ".4f"),
    ("loss_text", "text", ".4f"),
    ("loss_image", "image", ".4f"),
    ("grad_norm", "grad", ".2f"),
    ("lr", "lr", ".1e"),
)
_VALIDATION = (("val_loss_text", "text"), ("val_loss_image", "image"))


def _count(value: float) -> str:
    """12,345 -> 12.3k: three digits are enough to see whether a run slows down."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{suffix}" if value < 999.5 * size else f"{value / size:.0f}{suffix}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """Seconds as a person says them: `42s`, `5m12s`, `3h05m`, `2d04h`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d{hour:02d}h"
    if hours:
        return f"{hours}h{minute:02d}m"
    return f"{minutes}m{second:02d}s" if minutes else f"{second}s"
