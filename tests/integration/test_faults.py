"""Faults in real groups of processes: what can go on goes on as if nothing had been, the rest ends soon and says why.

Two data-parallel ranks without torchrun, so that no agent ends the one when the other dies.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from mmar_megatron.data.batch import Batch
from mmar_megatron.data.loader import TrainLoader
from mmar_megatron.data.source import DataSource
from mmar_megatron.data.stream import StreamState
from mmar_megatron.training.metrics import read_metrics, read_rows
from tests.distributed.common import MODEL, command, make_data
from tests.distributed.launch import ROOT
from tests.integration.test_resume import rows

pytestmark = pytest.mark.distributed

SHORT = [
    *("--train.steps", "6", "--train.log_every", "1", "--validation.every", "0", "--preview.every", "0"),
    *("--checkpoint.every", "0"),
]
LOOKED_AT = [
    *("--validation.every", "4", "--validation.samples", "4", "--preview.every", "4", "--preview.images", "1"),
    *("--preview.rounds", "1", "--preview.sampling_steps", "1"),
]
GUARDED = [
    *LOOKED_AT,
    "--checkpoint.every",
    "5",
    "--train.spike_zscore",
    "6",
    "--train.spike_window",
    "2",
    "--train.max_bad_steps",
    "3",
]
Fault = tuple[int, int, str, float]
"""Rank, step, kind and its argument, as in `faulty.py`."""
BAD_STEPS: list[Fault] = [(1, 3, "poison", 0), (0, 4, "poison", 0), (1, 6, "swell", 50)]
TERM, KILL = int(signal.SIGTERM), int(signal.SIGKILL)
HASTY = ["--train.hang_timeout_s", "8"]

# Waiting ones side by side with busy ones.
ROUNDS: list[dict[str, tuple[list[str], list[Fault]]]] = [
    {
        "whole": (GUARDED, BAD_STEPS),
        "stopped": (GUARDED, [*BAD_STEPS, (0, 4, "kill", TERM)]),
        "killed": ([], [(1, 3, "kill", KILL)]),
    },
    {
        "stopped-resumed": (GUARDED, BAD_STEPS),
        "hanging": (HASTY, [(1, 3, "slow", 1000)]),
        "seized": (HASTY, [(1, 3, "seize", 1000)]),
    },
    {
        "all-signalled": (
            ["--data.num_workers", "1", "--checkpoint.every", "2"],
            [(0, 3, "kill_all", TERM), (1, 3, "kill_all", TERM)],
        ),
        "signalled-twice": (["--checkpoint.every", "2"], [(0, 3, "kill", TERM), (0, 3, "slow", 4), (0, 3, "kill", TERM)]),
        "failed": ([], [(0, 3, "bad_data", 0)]),
    },
    {
        "hopeless": (["--train.max_bad_steps", "2"], [(1, 2, "poison", 0), (1, 3, "poison", 0)]),
        "slow": (
            ["--train.log_every", "2"],
            [(0, 1, "slow", 0.5), (0, 2, "slow", 0.5), (1, 3, "slow_pass", 0.5), (1, 4, "slow_pass", 0.5)],
        ),
    },
]


@dataclass(frozen=True, kw_only=True)
class Ending:
    """Of one rank."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data") / "shapes")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the run directories are, each by the name of its group; a resumed group continues the one before."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def endings(data: Path, root: Path) -> dict[str, list[Ending]]:
    """Of both ranks of all groups, from one start of Python."""
    rounds = [
        {
            name: {
                "options": [
                    *(*MODEL, *SHORT, *options, "--data.path", str(data)),
                    *("--run_dir", str(root / name.removesuffix("-resumed"))),
                ],
                "faults": faults,
            }
            for name, (options, faults) in groups.items()
        }
        for groups in ROUNDS
    ]
    written = root / "written"
    written.mkdir()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    driver = [sys.executable, str(ROOT / "tests/integration/faulty.py"), str(written), json.dumps(rounds)]
    finished = subprocess.run(driver, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=True)
    return {
        name: [
            Ending(
                code=code,
                out=(written / f"{name}.{rank}.out").read_text(),
                err=(written / f"{name}.{rank}.err").read_text(),
            )
            for rank, code in enumerate(of_ranks)
        ]
        for name, of_ranks in json.loads(finished.stdout.splitlines()[-1]).items()
    }


def codes(endings: list[Ending]) -> list[int]:
    return [ending.code for ending in endings]


def last_error(ending: Ending) -> str:
    return [line for line in ending.err.splitlines() if line.startswith("error: ")][-1]


def checkpoints(run_dir: Path) -> list[str]:
    return sorted(path.name for path in run_dir.glob("checkpoints/*"))


def saved(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, of model and optimizer."""
    plain = run_dir / f"step_{step}.pt"
    dcp_to_torch_save(run_dir / "checkpoints" / f"step_{step:08d}", plain)
    tensors = {name: value for name, value in torch.load(plain, weights_only=False).items() if isinstance(value, torch.Tensor)}
    assert len(tensors) > 100
    return tensors


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


# --- steps that are skipped -----------------------------------------------------------------------------------------------------


def samples_of_step(step: int, data: Path) -> list[str]:
    config = command(data=data).config
    loader = TrainLoader(
        DataSource(config.data),
        seed=config.seed,
        timestep_multiplier=config.model.head.timestep_multiplier,
        micro_batch_size=8,
        global_batch_size=8,
        state=StreamState(row=8 * (step - 1)),
    )
    return [f"data:{sample}" for (sample,) in next(iter(loader)).sample_ids_BK.tolist()]


def test_bad_steps_are_skipped_on_all_ranks_and_told_of(endings: dict[str, list[Ending]], root: Path, data: Path) -> None:
    assert codes(endings["whole"]) == [0, 0]
    incidents = read_rows(root / "whole" / "incidents.jsonl")
    assert [row["step"] for row in incidents] == [3, 4, 6]
    assert [row["samples"] for row in incidents] == [samples_of_step(step, data) for step in (3, 4, 6)]
    assert [row["loss"] is None for row in incidents] == [True, True, False]
    assert incidents[0]["reason"] == "the loss is nan, the gradient norm nan"
    assert "deviations above the recent" in incidents[2]["reason"]
    assert f"step 3: {incidents[0]['reason']}; the step is skipped (samples " in endings["whole"][1].out
    assert [row["skipped_steps"] for row in read_metrics(root / "whole")] == [0, 0, 1, 2, 2, 3]


def test_a_skipped_step_changes_nothing(endings: dict[str, list[Ending]], root: Path) -> None:
    """Between the checkpoints of steps 5 and 6 lies the leap of the loss alone."""
    assert_equal(saved(root / "whole", 5), saved(root / "whole", 6))


def test_too_many_bad_steps_end_the_run_with_a_diagnosis(endings: dict[str, list[Ending]], root: Path) -> None:
    assert codes(endings["hopeless"]) == [1, 1]
    directory = root / "hopeless" / "diagnosis" / "step_00000003"
    for ending in endings["hopeless"]:
        assert f"2 steps in a row were skipped: {directory} has samples" in last_error(ending)
    assert checkpoints(root / "hopeless") == []
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["bad_steps"] == read_rows(root / "hopeless" / "incidents.jsonl")
    assert (summary["step"], summary["bad_steps_in_a_row"], len(summary["recent_losses"])) == (3, 2, 1)
    assert summary["layout"] == "TP 1 x PP 1 x DP 2"
    samples, not_finite = [], set()
    for rank in range(2):
        health = json.loads((directory / f"rank_{rank:05d}.json").read_text())
        assert health["rank"] == rank
        assert health["weights_not_finite"] == []
        not_finite |= set(health["gradients_not_finite"])
        batches = [Batch(**tensors) for tensors in torch.load(directory / f"batch_{rank:05d}.pt")]
        assert any(batch.latents_MNC.isnan().any() for batch in batches) == (rank == 1)
        samples += [f"data:{sample}" for batch in batches for (sample,) in batch.sample_ids_BK.tolist()]
    assert "model0.embedding.vis_projector.0.weight" in not_finite  # of the rank that holds its share of the optimizer
    assert sorted(samples) == sorted(summary["bad_steps"][-1]["samples"])


# --- signals --------------------------------------------------------------------------------------------------------------------


def test_a_signal_to_one_rank_stops_all_after_the_same_step(endings: dict[str, list[Ending]], root: Path) -> None:
    assert codes(endings["stopped"]) == [0, 0]
    last = endings["stopped"][1].out.splitlines()[-1]
    assert last == f"SIGTERM: {root / 'stopped'} stands at step 4; the same command goes on from there"
    assert f"continues {root / 'stopped' / 'checkpoints' / 'step_00000004'} at step 4" in endings["stopped-resumed"][1].out


def test_a_run_that_was_stopped_between_bad_steps_equals_one_that_was_not(endings: dict[str, list[Ending]], root: Path) -> None:
    assert codes(endings["stopped-resumed"]) == [0, 0]
    whole, resumed = root / "whole", root / "stopped"
    assert rows(resumed) == rows(whole)
    assert "val_loss_text" in rows(whole)[3], "validation must have been due where the run was stopped"
    preview = "previews/step_00000004.png"
    assert (resumed / preview).read_bytes() == (whole / preview).read_bytes()
    assert read_rows(resumed / "incidents.jsonl") == read_rows(whole / "incidents.jsonl")
    assert_equal(saved(resumed, 6), saved(whole, 6))
    manifests = [json.loads((run / "checkpoints/step_00000006/manifest.json").read_text()) for run in (whole, resumed)]
    guarded = [(manifest["bad_steps_in_a_row"], manifest["recent_losses"]) for manifest in manifests]
    assert guarded[0] == guarded[1]
    assert guarded[0][0] == 1
    assert len(guarded[0][1]) == 2


def test_a_signal_to_all_processes_leaves_helpers_alive_that_are_needed(endings: dict[str, list[Ending]], root: Path) -> None:
    """Of the loader, and of the checkpoints, which have one since the first save."""
    assert codes(endings["all-signalled"]) == [0, 0], endings["all-signalled"][0].err
    assert checkpoints(root / "all-signalled") == ["step_00000002", "step_00000003"]


def test_a_second_signal_ends_at_once(endings: dict[str, list[Ending]], root: Path) -> None:
    first, second = endings["signalled-twice"]
    assert (first.code, second.code) == (128 + TERM, 1)
    assert "the job's store is gone" in last_error(second)
    assert checkpoints(root / "signalled-twice") == ["step_00000002"]


# --- ranks that fail ------------------------------------------------------------------------------------------------------------


def test_a_rank_that_fails_ends_the_others_with_its_error(endings: dict[str, list[Ending]]) -> None:
    failed, other = endings["failed"]
    assert (failed.code, other.code) == (1, 1)
    assert failed.err.splitlines() == ["error: nothing can be read"]
    assert other.err.splitlines() == ["error: rank 0: BadDataError: nothing can be read"]


def test_a_rank_that_is_killed_ends_the_others(endings: dict[str, list[Ending]]) -> None:
    other, killed = endings["killed"]
    assert (killed.code, other.code) == (-KILL, 1)
    assert last_error(other).startswith("error: no sign of life from rank 1; rank 0: RuntimeError: ")


def test_a_rank_that_hangs_ends_the_job_and_shows_where(endings: dict[str, list[Ending]]) -> None:
    waiting, hanging = endings["hanging"]
    assert (waiting.code, hanging.code) == (1, 1)
    assert "s in step 3; its threads:" in waiting.err
    assert "in all_reduce" in waiting.err
    assert "s in loading the data of step 3; its threads:" in hanging.err
    assert "faulty.py" in hanging.err
    (summary,) = [line for ending in (waiting, hanging) for line in ending.err.splitlines() if "rank 0 in step 3" in line]
    assert "rank 1 in loading the data of step 3" in summary


def test_a_rank_that_lets_no_thread_run_ends_nevertheless(endings: dict[str, list[Ending]]) -> None:
    waiting, seized = endings["seized"]
    assert (waiting.code, seized.code) == (1, 1)
    assert "no sign of life from rank 1" in last_error(waiting)
    assert "Timeout (0:00:15)!" in seized.err
    assert "faulty.py" in seized.err


# --- ranks that are slow --------------------------------------------------------------------------------------------------------


def test_the_slow_rank_is_named(endings: dict[str, list[Ending]], root: Path) -> None:
    """In loading, and in its passes; though both ranks take the same time for a step."""
    assert codes(endings["slow"]) == [0, 0]
    loading, passing, _ = read_metrics(root / "slow")
    assert [row["slowest_rank"] for row in (loading, passing)] == [0, 1]
    for row in (loading, passing):
        assert 0.5 < row["rank_time_max_s"] < row["step_time_s"]
        assert row["rank_time_mean_s"] < row["rank_time_max_s"] - 0.1
