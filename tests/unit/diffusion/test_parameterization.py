"""Targets, their inverse, the loss and guidance."""

import pytest
import torch
from torch import Tensor

from mmar_megatron.diffusion import (
    NoiseSchedule,
    Parameterization,
    ParameterizationName,
    ScheduleName,
    add_noise,
    check_compatible,
    diffusion_loss,
    guide,
    zero_loss,
)

ALLOWED = [
    ("cosine", "v"),
    ("cosine", "eps"),
    ("cosine", "x"),
    ("cosine_zero_snr", "v"),
    ("cosine_zero_snr", "x"),
    ("linear_interpolation", "x"),
    ("linear_interpolation", "flow"),
]
REFUSED = [
    ("cosine_zero_snr", "eps", "use 'v', or the schedule 'cosine'"),
    ("linear_interpolation", "eps", "use 'flow', or the schedule 'cosine'"),
    ("cosine", "flow", "use the schedule 'linear_interpolation', or the parameterization 'v'"),
    ("cosine_zero_snr", "flow", "use the schedule 'linear_interpolation', or the parameterization 'v'"),
    ("linear_interpolation", "v", "use the parameterization 'flow', or the schedule 'cosine'"),
]


def draw(schedule: NoiseSchedule, *, rows: int = 1000, channels: int = 3) -> dict[str, Tensor]:
    """Tokens, noise and levels in float64; every level occurs."""
    generator = torch.Generator().manual_seed(0)
    x, eps = torch.randn(2, rows, channels, generator=generator, dtype=torch.float64)
    t = torch.arange(rows) % schedule.num_timesteps
    alpha, sigma = (torch.from_numpy(table)[t, None] for table in (schedule.alpha_T, schedule.sigma_T))
    return {"x": x, "eps": eps, "alpha": alpha, "sigma": sigma}


def test_targets_are_the_published_ones() -> None:
    x, eps, alpha, sigma = (torch.tensor([[value]]) for value in (2.0, 3.0, 0.8, 0.6))
    targets = {
        name: Parameterization(name).target(x=x, eps=eps, alpha=alpha, sigma=sigma).item() for name in ("v", "eps", "x", "flow")
    }
    assert targets == pytest.approx({"v": 0.8 * 3 - 0.6 * 2, "eps": 3.0, "x": 2.0, "flow": 1.0})


@pytest.mark.parametrize(("schedule_name", "name"), ALLOWED)
def test_token_and_noise_come_back_in_float64(schedule_name: ScheduleName, name: ParameterizationName) -> None:
    schedule, parameterization = NoiseSchedule(schedule_name), Parameterization(name)
    check_compatible(schedule, parameterization)
    drawn = draw(schedule)
    levels = {"alpha": drawn["alpha"], "sigma": drawn["sigma"]}
    x_t = add_noise(drawn["x"], eps=drawn["eps"], **levels)
    x, eps = parameterization.to_x_eps(parameterization.target(**drawn), x_t=x_t, **levels)
    torch.testing.assert_close(x, drawn["x"], rtol=0, atol=1e-10)
    torch.testing.assert_close(eps, drawn["eps"], rtol=0, atol=1e-10)


@pytest.mark.parametrize(("schedule_name", "name", "fix"), REFUSED)
def test_contradictions_are_refused_with_the_fix(schedule_name: ScheduleName, name: ParameterizationName, fix: str) -> None:
    with pytest.raises(ValueError, match=fix):
        check_compatible(NoiseSchedule(schedule_name), Parameterization(name))


def test_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="choose one of v, eps, x, flow"):
        Parameterization("velocity")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["v", "eps", "x", "flow"])
def test_loss_is_fp32_whatever_the_inputs(name: ParameterizationName) -> None:
    """bf16 predictions and tokens give exactly the loss of the same values held in fp32: nothing is computed in bf16."""
    schedule, parameterization = NoiseSchedule("cosine"), Parameterization(name)
    alpha, sigma = schedule.alpha_sigma(torch.arange(0, 1000, 10))
    generator = torch.Generator().manual_seed(0)
    low = {key: torch.randn(100, 16, generator=generator).bfloat16() for key in ("u", "x", "eps")}
    wide = {key: value.float() for key, value in low.items()}
    levels = {"alpha": alpha, "sigma": sigma}
    x_t = add_noise(low["x"], eps=low["eps"], **levels)
    assert x_t.dtype == torch.float32
    assert torch.equal(x_t, add_noise(wide["x"], eps=wide["eps"], **levels))
    loss = diffusion_loss(**low, **levels, parameterization=parameterization)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, diffusion_loss(**wide, **levels, parameterization=parameterization))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss, diffusion_loss(**low, **levels, parameterization=parameterization))


@pytest.mark.parametrize("name", ["v", "eps", "x", "flow"])
def test_loss_is_the_mean_over_channels(name: ParameterizationName) -> None:
    parameterization = Parameterization(name)
    drawn = draw(NoiseSchedule("cosine"), rows=1000, channels=5)
    target = parameterization.target(**drawn)
    offset = torch.arange(5, dtype=torch.float64)
    loss = diffusion_loss(target + offset, **drawn, parameterization=parameterization)
    assert loss.shape == (1000,)
    torch.testing.assert_close(loss, torch.full((1000,), (0 + 1 + 4 + 9 + 16) / 5, dtype=torch.float64))


@pytest.mark.parametrize("name", ["v", "eps", "x", "flow"])
def test_zero_loss_is_the_loss_of_predicting_zero(name: ParameterizationName) -> None:
    parameterization = Parameterization(name)
    drawn = draw(NoiseSchedule("cosine"))
    zero = torch.zeros_like(drawn["x"])
    assert torch.equal(
        zero_loss(**drawn, parameterization=parameterization), diffusion_loss(zero, **drawn, parameterization=parameterization)
    )


def test_guidance_ends() -> None:
    u_cond, u_uncond = torch.randn(2, 4, 3, dtype=torch.float64)
    torch.testing.assert_close(guide(u_cond, u_uncond=u_uncond, scale=1.0), u_cond)
    torch.testing.assert_close(guide(u_cond, u_uncond=u_uncond, scale=0.0), u_uncond)
    torch.testing.assert_close(guide(u_cond, u_uncond=u_uncond, scale=3.0), 3 * u_cond - 2 * u_uncond)


@pytest.mark.parametrize(("schedule_name", "name"), ALLOWED)
def test_guiding_the_prediction_is_guiding_the_token(schedule_name: ScheduleName, name: ParameterizationName) -> None:
    schedule, parameterization = NoiseSchedule(schedule_name), Parameterization(name)
    drawn = draw(schedule)
    levels = {"alpha": drawn["alpha"], "sigma": drawn["sigma"]}
    x_t = add_noise(drawn["x"], eps=drawn["eps"], **levels)
    u_cond, u_uncond = torch.randn(2, *x_t.shape, dtype=torch.float64)
    token = {
        key: parameterization.to_x_eps(u, x_t=x_t, **levels)[0]
        for key, u in {"cond": u_cond, "uncond": u_uncond, "guided": guide(u_cond, u_uncond=u_uncond, scale=2.5)}.items()
    }
    expected = token["uncond"] + 2.5 * (token["cond"] - token["uncond"])
    torch.testing.assert_close(token["guided"], expected, rtol=1e-9, atol=1e-9)
