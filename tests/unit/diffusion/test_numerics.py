"""The theory of low-precision predictions: v has the least amplification, and measured errors follow the closed form."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mmar_megatron.diffusion import NoiseSchedule
from mmar_megatron.diffusion.numerics import (
    DTYPES,
    TargetName,
    Trajectory,
    edm_coefficients,
    relative_rounding_error,
    root_sum_of_squares,
    round_to,
    step_errors,
    target_coefficients,
)
from mmar_megatron.diffusion.sampler import step_coefficients

ROOT = Path(__file__).parents[3]
COSINE = NoiseSchedule("cosine")


def amplification_TS(c_x: object, c_eps: object) -> NDArray[np.float64]:
    """|B| from each level T to each level S of the cosine schedule."""
    alpha, sigma = COSINE.alpha_T, COSINE.sigma_T
    _, b_TS = step_coefficients(
        c_x=c_x, c_eps=c_eps, alpha_t=alpha[:, None], sigma_t=sigma[:, None], alpha_s=alpha[None], sigma_s=sigma[None]
    )
    return np.abs(b_TS)


def level_coefficients(target: TargetName, *, data_std: float = 1.0) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    return target_coefficients(target, alpha=COSINE.alpha_T[:, None], sigma=COSINE.sigma_T[:, None], data_std=data_std)


def test_amplification_is_the_closed_form_in_angles() -> None:
    phi = np.arctan2(COSINE.sigma_T, COSINE.alpha_T)
    angles: list[tuple[TargetName, Any]] = [("v", phi[:, None]), ("eps", 0.0), ("x", np.pi / 2)]
    for target, theta in angles:
        expected_TS: NDArray[np.float64] = np.abs(np.sin(phi[None] - phi[:, None]) / np.cos(phi[:, None] - theta))
        np.testing.assert_allclose(amplification_TS(*level_coefficients(target)), expected_TS, rtol=1e-9, atol=1e-13)


def test_v_amplifies_least_for_all_pairs_of_levels() -> None:
    """Against eps, x and EDM's direction, and against any angle theta, for all 1000 x 1000 pairs (t, s)."""
    v_TS = amplification_TS(*level_coefficients("v"))
    slack = 1 + 1e-12
    for target in ("eps", "x"):
        assert (v_TS <= amplification_TS(*level_coefficients(target)) * slack).all()
    c_x, c_eps = level_coefficients("edm", data_std=0.5)
    norm = np.hypot(c_x, c_eps)
    assert (v_TS <= amplification_TS(c_x / norm, c_eps / norm) * slack).all()
    for theta in np.linspace(0, np.pi, 24, endpoint=False):
        assert (v_TS <= amplification_TS(-np.sin(theta), np.cos(theta)) * slack).all()


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
@pytest.mark.parametrize("target", ["v", "eps", "x", "edm"])
def test_measured_error_follows_the_closed_form(target: TargetName, dtype: str) -> None:
    errors = step_errors(target, trajectory=Trajectory.of(COSINE, steps=100), dtype=DTYPES[dtype])
    np.testing.assert_allclose(errors.measured_K, errors.closed_form_K, rtol=0.02)


def test_published_ratios() -> None:
    """eps against v: 2.0e4 at the first step, then 64, 32, and 2.6 at t = 747; over all steps 2.0e3, or 8.2 without the first."""
    trajectory = Trajectory.of(COSINE, steps=100)
    b_K = {
        target: step_errors(target, trajectory=trajectory, dtype=torch.bfloat16, samples=64).amplification_K
        for target in ("v", "eps", "x")
    }
    assert [trajectory.timesteps[k] for k in (0, 1, 2, 25)] == [999, 989, 979, 747]
    assert (b_K["eps"] / b_K["v"])[[0, 1, 2, 25]] == pytest.approx([20291, 64.2, 32.1, 2.61], rel=2e-3)
    assert root_sum_of_squares(b_K["eps"]) / root_sum_of_squares(b_K["v"]) == pytest.approx(2002, rel=1e-3)
    assert root_sum_of_squares(b_K["eps"][1:]) / root_sum_of_squares(b_K["v"][1:]) == pytest.approx(8.20, rel=1e-3)
    assert root_sum_of_squares(b_K["x"]) / root_sum_of_squares(b_K["v"]) == pytest.approx(9.05, rel=1e-3)


def test_edm_target_is_minus_v_at_unit_data_std() -> None:
    edm, v = level_coefficients("edm", data_std=1.0), level_coefficients("v")
    for ours, theirs in zip(v, edm, strict=True):
        np.testing.assert_allclose(theirs, -ours, rtol=0, atol=1e-15)


def test_edm_coefficients_are_its_published_preconditioning() -> None:
    """F = (x - c_skip (x + sigma~ n)) / c_out with Karras et al.'s c_skip and c_out, sigma~ = sigma / alpha."""
    data_std, alpha, sigma = 0.5, COSINE.alpha_T[:-1], COSINE.sigma_T[:-1]
    ratio = sigma / alpha
    c_skip = data_std**2 / (ratio**2 + data_std**2)
    c_out = ratio * data_std / np.sqrt(ratio**2 + data_std**2)
    c_x, c_eps = edm_coefficients(alpha=alpha, sigma=sigma, data_std=data_std)
    np.testing.assert_allclose(c_x, (1 - c_skip) / c_out, rtol=1e-9)
    np.testing.assert_allclose(c_eps, -c_skip * ratio / c_out, rtol=1e-9)


@pytest.mark.parametrize("data_std", [0.25, 0.5, 2.0])
def test_edm_has_the_least_error_and_v_at_most_half_of_d_plus_its_inverse_times_that(data_std: float) -> None:
    """No linear target's error |B| rms(u) is below EDM's, and v's is at most (d + 1 / d) / 2 times it."""

    def error_TS(c_x: object, c_eps: object) -> NDArray[np.float64]:
        return amplification_TS(c_x, c_eps) * np.sqrt((data_std * np.asarray(c_x)) ** 2 + np.asarray(c_eps) ** 2)

    edm_TS = error_TS(*level_coefficients("edm", data_std=data_std))
    for theta in np.linspace(0, np.pi, 16, endpoint=False):
        assert (edm_TS <= error_TS(-np.sin(theta), np.cos(theta)) * (1 + 1e-12)).all()
    v_TS = error_TS(*level_coefficients("v"))
    off_diagonal = ~np.eye(len(v_TS), dtype=bool)
    worst = (v_TS[off_diagonal] / edm_TS[off_diagonal]).max()
    assert worst == pytest.approx((data_std + 1 / data_std) / 2, rel=1e-4)


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_relative_rounding_error_needs_no_fit(dtype: str) -> None:
    x = torch.randn(2**18, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    measured = (round_to(x, dtype=DTYPES[dtype]) - x).square().mean().sqrt() / x.square().mean().sqrt()
    assert measured.item() == pytest.approx(relative_rounding_error(DTYPES[dtype]), rel=0.02)


def test_eps_at_pure_noise_has_no_finite_error() -> None:
    trajectory = Trajectory.of(NoiseSchedule("cosine_zero_snr"), steps=10)
    errors = step_errors("eps", trajectory=trajectory, dtype=torch.bfloat16, samples=4096)
    assert errors.closed_form_K[0] == np.inf
    assert np.isnan(errors.measured_K[0])
    assert np.isfinite(errors.measured_K[1:]).all()
    v = step_errors("v", trajectory=trajectory, dtype=torch.bfloat16, samples=4096)
    assert np.isfinite(v.measured_K).all()


def run_tool(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "numerics.py"), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def test_tool_writes_table_json_and_plot(tmp_path: Path) -> None:
    """At zero SNR, so that what is infinite has to come through as null."""
    result = run_tool("--out", "out", "--schedule", "cosine_zero_snr", "--samples", "2048", "--steps", "20", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    table = (tmp_path / "out" / "numerics.md").read_text()
    assert table in result.stdout
    assert "| 999 | " in table
    report = json.loads((tmp_path / "out" / "numerics.json").read_text())
    assert report["edm_target_plus_v_at_unit_data_std"] < 1e-15
    assert set(report["dtypes"]) == {"bf16", "fp8"}
    steps = report["dtypes"]["bf16"]["steps"]
    assert steps["eps"]["closed_form"][0] is None
    assert np.allclose(steps["v"]["measured"], steps["v"]["closed_form"], rtol=0.1)
    assert (tmp_path / "out" / "numerics.png").read_bytes().startswith(b"\x89PNG")


def test_tool_names_the_formats_it_knows(tmp_path: Path) -> None:
    result = run_tool("--out", "out", "--dtype", "bf16,int3", cwd=tmp_path)
    assert result.returncode == 2
    assert "unknown number format int3: choose from fp16, bf16, fp8, fp8_e5m2" in result.stderr
    assert not (tmp_path / "out").exists()


def test_tool_refuses_too_many_steps_in_one_sentence(tmp_path: Path) -> None:
    result = run_tool("--out", "out", "--timesteps", "50", cwd=tmp_path)
    assert result.returncode != 0
    assert result.stderr.strip() == "numerics.py: 100 sampling steps asked of a schedule of 50 timesteps: use 1 to 50."
