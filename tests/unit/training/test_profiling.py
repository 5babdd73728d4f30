"""Which part of the model an operation belongs to, forward and backward; and what a profile leaves behind."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from mmar_megatron.data.tokenizer import Tokenizer
from mmar_megatron.parallel import ParallelGroups
from mmar_megatron.training.profiling import Profile, Times, by_part, table, with_parts
from tests.unit.tiny import Documents, engine_of


def test_what_runs_backward_belongs_where_its_counterpart_ran() -> None:
    a, b, c = (torch.randn(8, 8, requires_grad=True) for _ in range(3))
    with profile(activities=[ProfilerActivity.CPU]) as profiled, record_function("mmar step 1"):
        with record_function("mmar: linears"):
            x = a @ b
        x = x.exp()
        with record_function("mmar: head"):
            x = x @ c
        x.sum().backward()
    events = sorted(profiled.events(), key=lambda event: event.time_range.start)
    parts = [(event.name, part) for event, part in with_parts(events)]
    assert [part for name, part in parts if name == "MmBackward0"] == ["head", "linears"]
    assert {part for name, part in parts if name in ("aten::exp", "ExpBackward0", "SumBackward0")} == {"other"}
    # Each of the two products is one forward, and two backward.
    assert [part for name, part in parts if name == "aten::mm"] == ["linears", *["head"] * 3, *["linears"] * 2]


def event(name: str, start: float, end: float, *, parent: Any = None, kernels: dict[str, float] | None = None) -> Any:
    made = SimpleNamespace(
        name=name,
        time_range=SimpleNamespace(start=start, end=end),
        cpu_parent=parent,
        kernels=[SimpleNamespace(name=kernel, duration=time) for kernel, time in (kernels or {}).items()],
        self_cpu_time_total=end - start,
        device_type=DeviceType.CPU,
        sequence_nr=-1,
        thread=1,
        fwd_thread=0,
    )
    if parent is not None:
        parent.self_cpu_time_total -= end - start
    return made


def test_times_are_of_steps_alone_and_each_counts_once() -> None:
    step = event("mmar step 3", 100, 200, kernels={"mmar step 3": 90})
    attention = event("mmar: attention", 110, 160, parent=step, kernels={"mmar: attention": 30})
    products = event("aten::mm", 120, 150, parent=attention, kernels={"gemm": 25})
    optimizer = event("Optimizer.step#AdamW.step", 170, 190, parent=step, kernels={"Optimizer.step#AdamW.step": 9, "adam": 7})
    sums = event("nccl:all_reduce", 191, 195, parent=step, kernels={"ncclDevKernel": 11})
    elsewhere = event("aten::mm", 300, 400, kernels={"gemm": 50})
    kernel = event("gemm", 130, 155)
    kernel.device_type = DeviceType.CUDA
    events = [step, attention, products, optimizer, sums, elsewhere, kernel]
    assert by_part(events) == {
        "attention": Times(50, 25),
        "communication": Times(4, 11),
        "optimizer": Times(20, 7),
        "other": Times(26, 0),
    }
    lines = table(events, steps=2).splitlines()
    assert lines[3].split() == ["attention", "0.025", "50.0%", "0.013", "58.1%"]
    assert lines[-1].split() == ["together", "0.050", "100.0%", "0.021", "100.0%"]


@pytest.fixture
def run(groups: ParallelGroups, coarse_tokenizer: Tokenizer, tmp_path: Path) -> Any:
    """Takes steps of a tiny engine under a profile."""
    batch = Documents(coarse_tokenizer).mixed_batch()

    def take(steps: str | None, *, taken: range) -> tuple[list[float], Path]:
        engine = engine_of(groups)
        profiled = Profile(steps, run_dir=tmp_path, models=engine.models, groups=groups)
        losses = []
        for number in taken:
            with profiled.step(number):
                losses.append(engine.train_step([batch], learning_rate=1e-2).loss)
            if profiled.due(number):
                profiled.close()
        profiled.close()
        assert not [module for module in engine.models[0].modules() if module._forward_hooks or module._forward_pre_hooks]
        return losses, tmp_path / "profile"

    return take


def test_a_profile_changes_nothing_and_has_all_parts(run: Any) -> None:
    plain, directory = run(None, taken=range(1, 5))
    assert not directory.exists()
    profiled, directory = run("2:3", taken=range(1, 5))
    assert profiled == plain
    assert sorted(path.name for path in directory.iterdir()) == [
        f"steps_00000002-00000003_rank_00000.{ending}" for ending in ("json.gz", "txt")
    ]
    rows = {line.split()[0] for line in (directory / "steps_00000002-00000003_rank_00000.txt").read_text().splitlines()[3:]}
    assert {"embedding", "attention", "linears", "logits", "head", "optimizer", "other", "together"} <= rows
    with gzip.open(directory / "steps_00000002-00000003_rank_00000.json.gz") as file:
        names = {entry["name"] for entry in json.load(file)["traceEvents"] if "name" in entry}
    assert {"mmar step 2", "mmar step 3", "mmar: attention", "mmar: head"} <= names
    assert "mmar step 1" not in names


def test_what_is_left_of_the_steps_is_profiled(run: Any) -> None:
    """A run that goes on within them, and one that is stopped within them."""
    _, directory = run("2:9", taken=range(4, 6))
    assert {path.name[:24] for path in directory.iterdir()} == {"steps_00000004-00000005_"}
    _, directory = run("2:3", taken=range(4, 5))
    assert len(list(directory.iterdir())) == 2
