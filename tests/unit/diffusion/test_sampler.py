"""Samplers: given the exact prediction for a Gaussian mixture conditional on a class, they draw from that distribution."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor

from mmar_megatron.diffusion import (
    NoiseSchedule,
    Parameterization,
    ParameterizationName,
    Sampler,
    SamplerKind,
    ScheduleName,
    gaussian_noise,
)
from mmar_megatron.diffusion.sampler import midway_timesteps

ALLOWED = [
    ("cosine", "v"),
    ("cosine", "eps"),
    ("cosine", "x"),
    ("cosine_zero_snr", "v"),
    ("cosine_zero_snr", "x"),
    ("linear_interpolation", "x"),
    ("linear_interpolation", "flow"),
]
KINDS = ["ddim", "ancestral", "dpm_solver++"]
ROWS = 8192


@dataclass(frozen=True)
class Mixture:
    """For each class Y a mixture of K Gaussians over C channels."""

    weights_YK: Tensor
    means_YKC: Tensor
    stds_YKC: Tensor

    def exact(self, x_t_NC: Tensor, *, classes_N: Tensor, alpha: float, sigma: float) -> tuple[Tensor, Tensor, Tensor]:
        """(E[x | x_t, class], E[eps | x_t, class], responsibility of each component [N, K]), in closed form.

        Component k of x_t is normal, mean alpha m_k, variance alpha^2 s_k^2 + sigma^2; the conditional means are regressions.
        """
        means_NKC, stds_NKC = self.means_YKC[classes_N], self.stds_YKC[classes_N]
        variance_NKC = (alpha * stds_NKC) ** 2 + sigma**2
        residual_NKC = rearrange(x_t_NC, "n c -> n 1 c") - alpha * means_NKC
        log_density_NK = -0.5 * (residual_NKC**2 / variance_NKC + variance_NKC.log()).sum(dim=-1)
        share_NK = (self.weights_YK[classes_N].log() + log_density_NK).softmax(dim=-1)
        share_NK1 = rearrange(share_NK, "n k -> n k 1")
        x_NC = (share_NK1 * (means_NKC + alpha * stds_NKC**2 * residual_NKC / variance_NKC)).sum(dim=1)
        eps_NC = (share_NK1 * sigma * residual_NKC / variance_NKC).sum(dim=1)
        return x_NC, eps_NC, share_NK


MIXTURE = Mixture(
    weights_YK=torch.tensor([[0.7, 0.3], [0.25, 0.75]], dtype=torch.float64),
    means_YKC=torch.tensor([[[-1.2, 0.3], [1.1, 0.8]], [[0.0, -1.4], [0.5, 1.2]]], dtype=torch.float64),
    stds_YKC=torch.tensor([[[0.2, 0.4], [0.3, 0.2]], [[0.4, 0.25], [0.2, 0.3]]], dtype=torch.float64),
)
CLASSES_N = torch.arange(ROWS) % 2


def exact_prediction(schedule: NoiseSchedule, parameterization: Parameterization) -> Callable[[Tensor, Tensor], Tensor]:
    """The best possible network: E[u | x_t, class]."""

    def predict(x_t_NC: Tensor, t_N: Tensor) -> Tensor:
        assert x_t_NC.dtype == torch.float32
        alpha, sigma = float(schedule.alpha_T[t_N[0]]), float(schedule.sigma_T[t_N[0]])
        x_NC, eps_NC, _ = MIXTURE.exact(x_t_NC.double(), classes_N=CLASSES_N, alpha=alpha, sigma=sigma)
        return parameterization.target(x=x_NC, eps=eps_NC, alpha=torch.tensor(alpha), sigma=torch.tensor(sigma))

    return predict


def seeded_noise(seed: int, *, rows: int = ROWS) -> Callable[[int], Tensor]:
    return gaussian_noise(torch.Generator().manual_seed(seed), shape=(rows, 2))


def sample_mixture(schedule_name: ScheduleName, name: ParameterizationName, *, kind: SamplerKind, steps: int) -> Tensor:
    schedule, parameterization = NoiseSchedule(schedule_name), Parameterization(name)
    sampler = Sampler(schedule=schedule, parameterization=parameterization, steps=steps, kind=kind)
    return sampler.sample(exact_prediction(schedule, parameterization), noise=seeded_noise(0))


def by_component(x_NC: Tensor) -> dict[tuple[int, int], Tensor]:
    """The samples of each class's components, in float64; a sample belongs to the likeliest."""
    _, _, share_NK = MIXTURE.exact(x_NC.double(), classes_N=CLASSES_N, alpha=1.0, sigma=0.0)
    component_N = share_NK.argmax(dim=-1)
    return {(y, k): x_NC[(CLASSES_N == y) & (component_N == k)].double() for y in range(2) for k in range(2)}


@pytest.mark.parametrize(("kind", "steps", "bias"), [("ddim", 150, 0.03), ("ancestral", 400, 0.04)])
@pytest.mark.parametrize(("schedule_name", "name"), ALLOWED)
def test_exact_prediction_samples_the_conditional_distribution(
    schedule_name: ScheduleName, name: ParameterizationName, kind: SamplerKind, steps: int, bias: float
) -> None:
    """Each class's weights, means, standard deviations and correlations, to 4.5 standard errors.

    Finitely many steps leave components narrower by a share that falls with their number (ancestral at 100, 200, 400, 1000 steps:
    about 13, 8, 5, 2 % for a component of standard deviation 0.1): `bias`.
    """
    x_NC = sample_mixture(schedule_name, name, kind=kind, steps=steps)
    assert x_NC.dtype == torch.float32
    for (y, k), rows_NC in by_component(x_NC).items():
        weight, std_C, of_class = MIXTURE.weights_YK[y, k].item(), MIXTURE.stds_YKC[y, k], ROWS / 2
        error = 4.5 / math.sqrt(len(rows_NC))
        assert len(rows_NC) / of_class == pytest.approx(weight, abs=4.5 * math.sqrt(weight * (1 - weight) / of_class))
        assert ((rows_NC.mean(dim=0) - MIXTURE.means_YKC[y, k]).abs() < error * std_C).all()
        assert ((rows_NC.std(dim=0) / std_C - 1).abs() < error / math.sqrt(2) + bias).all()
        assert torch.corrcoef(rows_NC.T)[0, 1].abs() < error


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("schedule_name", "name"), ALLOWED)
def test_parameterizations_of_one_schedule_draw_the_same_samples(
    schedule_name: ScheduleName, name: ParameterizationName, kind: SamplerKind
) -> None:
    """In exact arithmetic they are one; eps loses digits in its first step, where it is divided by alpha = 5e-5."""
    difference_NC = sample_mixture(schedule_name, name, kind=kind, steps=20) - sample_mixture(
        schedule_name, "x", kind=kind, steps=20
    )
    assert difference_NC.square().mean().sqrt() < (5e-4 if name == "eps" else 1e-5)


@pytest.mark.parametrize("name", ["v", "eps", "x"])
def test_one_step_from_pure_noise_is_the_mean(name: ParameterizationName) -> None:
    """A single step returns E[x | x_T, class], exactly so at zero SNR; eps is divided by alpha = 5e-5: it shows even in fp32."""
    schedule_name: ScheduleName = "cosine" if name == "eps" else "cosine_zero_snr"
    x_NC = sample_mixture(schedule_name, name, kind="ddim", steps=1)
    mean_YC = (rearrange(MIXTURE.weights_YK, "y k -> y k 1") * MIXTURE.means_YKC).sum(dim=1)
    torch.testing.assert_close(x_NC, mean_YC[CLASSES_N].float(), rtol=0, atol=2e-2 if name == "eps" else 1e-6)


def test_timesteps_are_iddpms() -> None:
    sampler = Sampler(schedule=NoiseSchedule("cosine"), parameterization=Parameterization("v"), steps=100)
    assert sampler.timesteps()[:3] == [999, 989, 979]
    assert sampler.timesteps()[25] == 747
    assert sampler.timesteps()[-2:] == [10, 0]
    every = Sampler(schedule=NoiseSchedule("cosine"), parameterization=Parameterization("v"), steps=1000)
    assert every.timesteps() == list(range(999, -1, -1))
    one = Sampler(schedule=NoiseSchedule("cosine"), parameterization=Parameterization("v"), steps=1)
    assert one.timesteps() == [999]


@pytest.mark.parametrize("schedule_name", ["cosine", "cosine_zero_snr", "linear_interpolation"])
def test_ancestral_keeps_the_noise_at_its_level(schedule_name: ScheduleName) -> None:
    """Where every token is 0, x_t / sigma_t is standard normal at each step, at any spacing, variance preserved or not."""
    schedule = NoiseSchedule(schedule_name)
    sampler = Sampler(schedule=schedule, parameterization=Parameterization("x"), steps=7, kind="ancestral")
    stds = []

    def predict(x_t_NC: Tensor, t_N: Tensor) -> Tensor:
        stds.append(x_t_NC.std().item() / schedule.sigma_T[t_N[0]])
        return torch.zeros_like(x_t_NC)

    sampler.sample(predict, noise=seeded_noise(0, rows=40000))
    assert stds == pytest.approx([1.0] * 7, abs=0.012)


@pytest.mark.parametrize("schedule_name", ["cosine", "cosine_zero_snr"])
def test_ancestral_is_ddpms_posterior(schedule_name: ScheduleName) -> None:
    """Ho et al. (2020), equations 6 and 7, with the beta of a step between respaced levels."""
    schedule = NoiseSchedule(schedule_name)
    sampler = Sampler(schedule=schedule, parameterization=Parameterization("x"), steps=10, kind="ancestral", temperature=0.5)
    for step, following in pairwise(sampler.steps):
        alpha_bar_t, alpha_bar_s = (float(schedule.alpha_T[t] ** 2) for t in (step.t, following.t))
        beta = 1 - alpha_bar_t / alpha_bar_s
        assert step.output == pytest.approx(math.sqrt(alpha_bar_s) * beta / (1 - alpha_bar_t), rel=1e-9)
        assert step.state == pytest.approx(math.sqrt(1 - beta) * (1 - alpha_bar_s) / (1 - alpha_bar_t), rel=1e-9)
        assert step.noise == pytest.approx(0.5 * math.sqrt(beta * (1 - alpha_bar_s) / (1 - alpha_bar_t)), rel=1e-9)
    last = sampler.steps[-1]
    assert (last.state, last.output, last.noise) == (0, 1, 0)


def test_temperature_of_ddim_scales_its_start() -> None:
    seen = []

    def predict(x_t_NC: Tensor, _: Tensor) -> Tensor:
        seen.append(x_t_NC.clone())
        return torch.zeros_like(x_t_NC)

    arguments: dict[str, Any] = {"schedule": NoiseSchedule("cosine"), "parameterization": Parameterization("v"), "steps": 3}
    for temperature in (1.0, 0.5, 0.0):
        Sampler(**arguments, temperature=temperature).sample(predict, noise=seeded_noise(1))
    torch.testing.assert_close(seen[3], 0.5 * seen[0])
    assert (seen[6] == 0).all()


@pytest.mark.parametrize(("schedule_name", "name"), [("cosine", "v"), ("cosine_zero_snr", "v"), ("linear_interpolation", "flow")])
def test_dpm_solver_follows_the_path_to_the_second_order(schedule_name: ScheduleName, name: ParameterizationName) -> None:
    """Twice the steps leave more than half of DDIM's error, and less than half of this one's, which at 20 is below half of it."""
    path_NC = sample_mixture(schedule_name, name, kind="dpm_solver++", steps=1000)
    errors = {
        (kind, steps): (sample_mixture(schedule_name, name, kind=kind, steps=steps) - path_NC).square().mean().sqrt().item()
        for kind in ("ddim", "dpm_solver++")
        for steps in (10, 20, 40, 80)
    }
    long_path_NC = sample_mixture(schedule_name, name, kind="ddim", steps=1000)
    assert (long_path_NC - path_NC).square().mean().sqrt() < 0.2 * errors["ddim", 80]
    for steps in (10, 20, 40):
        assert 0.5 < errors["ddim", 2 * steps] / errors["ddim", steps] < 0.7
        assert errors["dpm_solver++", 2 * steps] / errors["dpm_solver++", steps] < 0.5
    assert errors["dpm_solver++", 20] < 0.5 * errors["ddim", 20]


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 500, 999, 1000])
@pytest.mark.parametrize("schedule_name", ["cosine", "cosine_zero_snr", "linear_interpolation"])
def test_midway_levels_are_as_many_as_asked_for(schedule_name: ScheduleName, steps: int) -> None:
    levels = midway_timesteps(NoiseSchedule(schedule_name), steps=steps)
    assert len(levels) == steps
    assert levels[0] == 999
    assert steps == 1 or levels[-1] == 0
    assert all(before > after for before, after in pairwise(levels))


def test_dpm_solver_begins_and_ends_as_ddim() -> None:
    settings: dict[str, Any] = {"schedule": NoiseSchedule("cosine"), "parameterization": Parameterization("v"), "steps": 7}
    ours, ddim = Sampler(**settings, kind="dpm_solver++").steps, Sampler(**settings).steps
    assert (ours[-1].state, ours[-1].output) == pytest.approx((ddim[-1].state, ddim[-1].output), abs=1e-12)
    assert [step.memory == 0 for step in ours] == [True, *[False] * 5, True]
    two, two_ddim = (Sampler(**{**settings, "steps": 2}, kind=kind).steps for kind in ("dpm_solver++", "ddim"))
    for step, other in zip(two, two_ddim, strict=True):
        assert (step.state, step.output, step.memory) == pytest.approx((other.state, other.output, 0), abs=1e-12)


def test_temperature_of_ancestral_scales_its_fresh_noise_alone() -> None:
    """The start is unscaled; at temperature 0 what follows does not depend on the later noise, and a component is less spread."""

    def frozen_start(seed: int) -> Callable[[int], Tensor]:
        start, later = seeded_noise(0), seeded_noise(seed)
        return lambda draw: start(0) if draw == 0 else later(draw)

    starts = []

    def predict(x_t_NC: Tensor, t_N: Tensor) -> Tensor:
        if t_N[0] == 999:
            starts.append(x_t_NC)
        return exact(x_t_NC, t_N)

    schedule, parameterization = NoiseSchedule("cosine"), Parameterization("v")
    exact = exact_prediction(schedule, parameterization)
    samples = {
        (temperature, seed): Sampler(
            schedule=schedule, parameterization=parameterization, steps=25, kind="ancestral", temperature=temperature
        ).sample(predict, noise=frozen_start(seed))
        for temperature in (0.0, 1.0)
        for seed in (1, 2)
    }
    assert len(starts) == 4
    assert all(torch.equal(start, starts[0]) for start in starts)
    assert torch.equal(samples[0.0, 1], samples[0.0, 2])
    assert not torch.equal(samples[1.0, 1], samples[1.0, 2])
    cold, warm = (by_component(samples[temperature, 1])[0, 0].std(dim=0) for temperature in (0.0, 1.0))
    assert (cold < 0.5 * warm).all()


def test_ddim_draws_noise_once_and_ancestral_after_each_step_but_the_last() -> None:
    def draws(kind: SamplerKind) -> list[int]:
        drawn = []

        def noise(draw: int) -> Tensor:
            drawn.append(draw)
            return torch.ones(2, 2)

        sampler = Sampler(schedule=NoiseSchedule("cosine"), parameterization=Parameterization("v"), steps=4, kind=kind)
        sampler.sample(lambda x_t_NC, _: x_t_NC, noise=noise)
        return drawn

    assert draws("ddim") == [0]
    assert draws("dpm_solver++") == [0]
    assert draws("ancestral") == [0, 1, 2, 3]


def test_state_stays_fp32_under_a_bf16_network() -> None:
    sampler = Sampler(schedule=NoiseSchedule("cosine"), parameterization=Parameterization("v"), steps=4)
    dtypes = []

    def predict(x_t_NC: Tensor, t_N: Tensor) -> Tensor:
        dtypes.append((x_t_NC.dtype, t_N.dtype))
        return x_t_NC.bfloat16()

    assert sampler.sample(predict, noise=lambda _: torch.ones(3, 2, dtype=torch.bfloat16)).dtype == torch.float32
    assert dtypes == [(torch.float32, torch.int64)] * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "use 1 to 1000"),
        ({"steps": 1001}, "use 1 to 1000"),
        ({"temperature": -0.1}, "use 0"),
        ({"schedule": NoiseSchedule("cosine_zero_snr"), "parameterization": Parameterization("eps")}, "which is pure noise"),
        ({"kind": "euler"}, "Unknown sampler 'euler': choose one of ddim, ancestral, dpm_solver"),
    ],
)
def test_bad_settings_are_refused(change: dict[str, object], message: str) -> None:
    settings: dict[str, Any] = {"schedule": NoiseSchedule("cosine"), "parameterization": Parameterization("v"), "steps": 10}
    with pytest.raises(ValueError, match=message):
        Sampler(**(settings | change))
