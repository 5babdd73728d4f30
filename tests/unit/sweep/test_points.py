"""`fit --sweep` on a sweep whose runs' files are written here, from a known law."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from mmar_megatron.sweep.points import points_of
from mmar_megatron.sweep.records import SweepPlan
from tests.unit.scaling.law.surfaces import Truth, isoflop_grid, measured
from tests.unit.sweep.sweeps import planned, pretended
from tools.sweep import main

TEXT, IMAGE = Truth(), Truth(E=0.13, A=30.0, B=8.0, alpha=0.4, beta=0.25)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> SweepPlan:
    """42 finished runs, one that is not, and one that ended without a finite loss."""
    params, tokens = isoflop_grid(TEXT)
    rng = np.random.default_rng(0)
    losses = [measured(truth, params, tokens, rng=rng, noise=0.002) for truth in (TEXT, IMAGE)]
    plan = pretended(tmp_path_factory.mktemp("points") / "sweep", names=())
    for k, (size, data) in enumerate(zip(params, tokens, strict=True)):
        budget = float(f"{6 * size * data:.3g}")
        plan.runs.append(planned(f"run{k}", steps=4, budget=budget, n_params=round(size)))
    plan.runs.extend([planned("open", steps=4), planned("diverged", steps=4)])
    plan.write()
    for k, run in enumerate(plan.runs):
        text, image = (float(loss[k]) if k < 42 else None for loss in losses)
        row = {"step": 4, "consumed_tokens": round(float(tokens[k % 42])), "val_loss_text": text, "val_loss_image": image}
        row["val_loss_image_zero"] = image
        checkpoint = plan.run_dir(run) / "checkpoints" / f"step_{4 if run.name != 'open' else 2:08d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "manifest.json").touch()
        early = {"step": 2, "consumed_tokens": 1, "val_loss_text": 99.0, "val_loss_image": 99.0}
        rows = [early] if run.name == "open" else [early, row]
        (plan.run_dir(run) / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    return plan


def test_law_of_both_losses(plan: SweepPlan, capsys: pytest.CaptureFixture[str]) -> None:
    main(["fit", "--sweep", str(plan.directory), "--budget", "1e22", "--resamples", "100"])
    out = plan.directory / "law"
    fits = json.loads((out / "fit.json").read_text())
    assert list(fits) == ["val_loss_text", "val_loss_image"]
    for fit, truth in zip(fits.values(), (TEXT, IMAGE), strict=True):
        for name in ("E", "alpha", "beta"):
            assert fit[name]["value"] == pytest.approx(getattr(truth, name), rel=0.3)
        assert len(fit["isoflop"]["budgets"]) == 6
    with (out / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == [run.name for run in plan.runs[:42]]
    first, run = rows[0], plan.runs[0]
    assert (int(first["n_params"]), int(first["flops"]), first["budget"]) == (run.n_params, run.flops, f"{run.budget:g}")
    assert int(first["n_tokens"]) == round(float(isoflop_grid(TEXT)[1][0])), "as the trainer counted them"
    said = capsys.readouterr().err
    assert "1 of 44 runs are not done and are left out: open" in said
    assert "1 runs have ended with a loss that is not finite and are left out: diverged" in said


def test_other_losses_and_mistakes(plan: SweepPlan, tmp_path: Path) -> None:
    text, _ = points_of(plan, losses=["val_loss_image_zero"])
    assert text.splitlines()[0] == "run,budget,n_params,n_tokens,flops,val_loss_image_zero"
    with pytest.raises(
        ValueError, match=r"has no `val_loss` at its last step, only consumed_tokens, step, .*: name others by --loss"
    ):
        points_of(plan, losses=["val_loss"])
    empty = pretended(tmp_path / "empty", names=("a",))
    with pytest.raises(ValueError, match=r"no run of .* is done: start them with"):
        points_of(empty, losses=["val_loss_text"])
    with pytest.raises(SystemExit, match="fit --csv needs --out"):
        main(["fit", "--csv", str(tmp_path / "x.csv")])
