"""Noise schedules: the published formulas, their ends, and how the table reaches a device."""

import math

import numpy as np
import pytest
import torch

from mmar_megatron.diffusion import NoiseSchedule, ScheduleName


def iddpm_alpha_bar(num_timesteps: int, *, max_beta: float) -> list[float]:
    """Nichol and Dhariwal's schedule as they define it: betas from a ratio of squared cosines, clipped, multiplied up."""
    alpha_bar, product = [], 1.0
    for i in range(num_timesteps):
        t0, t1 = i / num_timesteps, (i + 1) / num_timesteps
        ratio = math.cos((t1 + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos((t0 + 0.008) / 1.008 * math.pi / 2) ** 2
        product *= 1 - min(1 - ratio, max_beta)
        alpha_bar.append(product)
    return alpha_bar


@pytest.mark.parametrize("num_timesteps", [10, 1000])
def test_cosine_is_iddpm(num_timesteps: int) -> None:
    schedule = NoiseSchedule("cosine", num_timesteps=num_timesteps)
    np.testing.assert_allclose(schedule.alpha_T**2, iddpm_alpha_bar(num_timesteps, max_beta=0.999), rtol=1e-10)


def test_cosine_ends() -> None:
    schedule = NoiseSchedule("cosine", num_timesteps=1000)
    assert schedule.alpha_T[-1] == pytest.approx(4.928e-5, rel=1e-3)
    assert schedule.sigma_T[0] == pytest.approx(6.425e-3, rel=1e-3)
    assert not schedule.ends_in_pure_noise


def test_zero_snr_differs_from_cosine_in_the_last_level_alone() -> None:
    cosine, zero_snr = NoiseSchedule("cosine"), NoiseSchedule("cosine_zero_snr")
    assert zero_snr.ends_in_pure_noise
    assert (zero_snr.alpha_T[-1], zero_snr.sigma_T[-1]) == (0.0, 1.0)
    np.testing.assert_array_equal(cosine.alpha_T[:-1], zero_snr.alpha_T[:-1])
    np.testing.assert_array_equal(cosine.sigma_T[:-1], zero_snr.sigma_T[:-1])


@pytest.mark.parametrize("name", ["cosine", "cosine_zero_snr"])
def test_cosine_preserves_variance(name: ScheduleName) -> None:
    schedule = NoiseSchedule(name)
    np.testing.assert_allclose(schedule.alpha_T**2 + schedule.sigma_T**2, 1.0, rtol=1e-14)


def test_linear_interpolation_is_a_straight_line_to_pure_noise() -> None:
    schedule = NoiseSchedule("linear_interpolation", num_timesteps=4)
    np.testing.assert_allclose(schedule.sigma_T, [0.25, 0.5, 0.75, 1.0])
    np.testing.assert_allclose(schedule.alpha_T, [0.75, 0.5, 0.25, 0.0])
    assert schedule.ends_in_pure_noise


@pytest.mark.parametrize("name", ["cosine", "cosine_zero_snr", "linear_interpolation"])
def test_noise_grows(name: ScheduleName) -> None:
    schedule = NoiseSchedule(name)
    assert (np.diff(schedule.alpha_T) < 0).all()
    assert (np.diff(schedule.sigma_T) >= 0).all()


def test_index_covers_every_level_evenly_and_never_more() -> None:
    schedule = NoiseSchedule("cosine", num_timesteps=1000)
    middles = (torch.arange(1000) + 0.5) / 1000
    assert torch.equal(schedule.index(middles), torch.arange(1000))
    below_one = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0))
    assert schedule.index(torch.stack([torch.tensor(0.0), below_one])).tolist() == [0, 999]
    assert NoiseSchedule("cosine", num_timesteps=1025).index(below_one).item() == 1024


def test_alpha_sigma_has_a_trailing_channel_axis_in_fp32() -> None:
    schedule = NoiseSchedule("cosine")
    t_MNR = torch.tensor([[[0, 999]], [[500, 3]]])
    alpha, sigma = schedule.alpha_sigma(t_MNR)
    assert alpha.shape == sigma.shape == (2, 1, 2, 1)
    assert alpha.dtype == sigma.dtype == torch.float32
    np.testing.assert_allclose(alpha[..., 0].numpy(), schedule.alpha_T[t_MNR.numpy()], rtol=1e-7)
    np.testing.assert_allclose(sigma[..., 0].numpy(), schedule.sigma_T[t_MNR.numpy()], rtol=1e-7)


def test_built_under_the_meta_device_it_still_has_its_table() -> None:
    with torch.device("meta"):
        schedule = NoiseSchedule("cosine")
    alpha, _ = schedule.alpha_sigma(torch.tensor([0]))
    assert alpha.item() == pytest.approx(schedule.alpha_T[0])


def test_first_used_in_inference_mode_it_still_trains() -> None:
    schedule = NoiseSchedule("cosine")
    with torch.inference_mode():
        schedule.alpha_sigma(torch.tensor([1]))
    x = torch.ones(1, 2, requires_grad=True)
    alpha, _ = schedule.alpha_sigma(torch.tensor([1]))
    (alpha * x).sum().backward()
    assert x.grad is not None


def test_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="choose one of cosine, cosine_zero_snr, linear_interpolation"):
        NoiseSchedule("linear")  # type: ignore[arg-type]
