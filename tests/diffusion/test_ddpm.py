from __future__ import annotations

import numpy as np
import pytest
import torch

from common.config import BETA_SCHEDULES, PARAMETRIZATIONS, DiffusionConfig
from common.errors import InputError
from diffusion import NoiseSchedule, ddim_step, ddpm_step, time_input
from diffusion.ddpm import to_eps, to_posterior_mean, to_x0, training_target


def tables() -> tuple[torch.Tensor, torch.Tensor]:
    """beta and alpha_bar of the linear schedule, without the code under test."""
    beta = torch.tensor([1e-4 + (0.02 - 1e-4) * t / 999 for t in range(1000)], dtype=torch.float64)
    return beta, torch.stack([(1 - beta[: t + 1]).prod() for t in range(1000)])


def test_the_linear_schedule():
    schedule, (beta, alpha_bar) = NoiseSchedule(), tables()
    torch.testing.assert_close(schedule.betas, beta)
    torch.testing.assert_close(schedule.alphas_cumprod, alpha_bar)
    assert schedule.betas.dtype == schedule.posterior_variance.dtype == torch.float64
    assert schedule.posterior_variance[0] == 0


def test_the_scaled_linear_schedule_is_linear_in_the_standard_deviation():
    std = NoiseSchedule(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).betas.sqrt()
    torch.testing.assert_close(std.diff(), std.diff()[:1].expand(999))
    torch.testing.assert_close(std[[0, -1]].square(), torch.tensor([0.00085, 0.012], dtype=torch.float64))


def vp_alpha_bar(time: float, least: float, most: float) -> float:
    """exp of minus the integral of a beta that rises from least to most over time 0..1, by the trapezium rule."""
    return float(np.exp(-time * (least + least + (most - least) * time) / 2))


@pytest.mark.parametrize("num_timesteps, start, end", [(1000, 1e-4, 0.02), (50, 2e-3, 0.4), (1000, 0.01, 0.01)])
def test_the_continuous_vp_schedule_is_that_process_at_equal_times(num_timesteps, start, end):
    schedule = NoiseSchedule(num_timesteps, "continuous_vp", start, end)
    times = [(t + 1) / num_timesteps for t in range(num_timesteps)]
    want = [vp_alpha_bar(time, num_timesteps * start, num_timesteps * end) for time in times]
    torch.testing.assert_close(schedule.alphas_cumprod, torch.tensor(want, dtype=torch.float64), rtol=1e-11, atol=0)
    torch.testing.assert_close(schedule.alphas.cumprod(0), schedule.alphas_cumprod)
    for time in (0.0, 0.12345, times[3], 1.0, 1.01):
        alpha_bar = vp_alpha_bar(time, num_timesteps * start, num_timesteps * end)
        assert schedule.timestep_at(alpha_bar) == pytest.approx(num_timesteps * time - 1, abs=1e-6)


@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
@pytest.mark.parametrize("num_timesteps", [1, 2, 1000])
def test_a_timestep_is_found_again_by_its_alpha_bar(beta_schedule, num_timesteps):
    schedule = NoiseSchedule(num_timesteps, beta_schedule)
    for t in {0, num_timesteps // 3, num_timesteps - 1}:
        assert schedule.timestep_at(schedule.alpha_bar(t)) == pytest.approx(t, abs=1e-6)


def test_between_and_beyond_timesteps_t_is_linear_in_log_alpha_bar():
    schedule, log = NoiseSchedule(), np.log(tables()[1].numpy())
    for t in (0, 499, 998):
        assert schedule.timestep_at(np.exp(0.75 * log[t] + 0.25 * log[t + 1])) == pytest.approx(t + 0.25)
    assert schedule.timestep_at(np.exp(log[0] - 0.5 * (log[1] - log[0]))) == pytest.approx(-0.5)
    assert schedule.timestep_at(np.exp(log[-1] + 2 * (log[-1] - log[-2]))) == pytest.approx(1001)
    assert time_input(DiffusionConfig(time_scale=0.5, time_shift=3), 0.5) == pytest.approx(
        0.5 * (float(np.interp(-np.log(0.5), -log, np.arange(1000))) + 3)
    )


@pytest.mark.parametrize("wrong", [0.0, -0.1, 1.1, float("nan")])
@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
def test_what_is_no_alpha_bar_is_named(wrong, beta_schedule):
    with pytest.raises(InputError, match=f"alpha_bar={wrong}"):
        time_input(DiffusionConfig(beta_schedule=beta_schedule), wrong)


@pytest.mark.parametrize(
    "wrong", [{"num_timesteps": 0}, {"beta_schedule": "quadratic"}, {"beta_start": 0.1}, {"beta_end": 1.0}]
)
def test_a_schedule_that_is_none_is_named(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        NoiseSchedule(**wrong)


@pytest.mark.parametrize("t", [0, 1, 10, 500, 999])
def test_ddpm_step_is_bayes_rule_for_two_gaussians(t):
    """Precisions add: x_{t-1} given x0 is one Gaussian, x_t given x_{t-1} the other."""
    beta, alpha_bar = tables()
    previous = alpha_bar[t - 1] if t else torch.tensor(1.0, dtype=torch.float64)
    x0, eps = torch.randn(2, 1, 1, 4, 4, dtype=torch.float64)
    x_t = alpha_bar[t].sqrt() * x0 + (1 - alpha_bar[t]).sqrt() * eps
    schedule, zero, one = NoiseSchedule(), torch.zeros_like(x0), torch.ones_like(x0)
    still, moved = (ddpm_step(schedule, eps, x_t, t, noise) for noise in (zero, one))
    if t == 0:
        torch.testing.assert_close(still, x0)
        assert torch.equal(still, moved)
        return
    precision = (1 - beta[t]) / beta[t] + 1 / (1 - previous)
    pull = (1 - beta[t]).sqrt() / beta[t] * x_t + previous.sqrt() / (1 - previous) * x0
    torch.testing.assert_close(still, pull / precision)
    torch.testing.assert_close((moved - still).square(), torch.full_like(x0, 1 / precision))


@pytest.mark.parametrize("t", [0, 1, 500, 999])
@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
def test_all_parametrizations_stand_for_the_same_image(t, parametrization):
    schedule = NoiseSchedule()
    x0, eps, noise = torch.randn(3, 2, 1, 4, 4, dtype=torch.float64)
    x_t = schedule.q_sample(x0, t, eps)
    output = training_target(schedule, x0, x_t, torch.tensor([t, t]), eps, parametrization)
    close = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(to_eps(schedule, output, x_t, t, parametrization), eps, **close)
    torch.testing.assert_close(to_x0(schedule, output, x_t, t, parametrization), x0, **close)
    mean = to_posterior_mean(schedule, output, x_t, t, parametrization)
    torch.testing.assert_close(mean, schedule.posterior_mean(x0, x_t, t), **close)
    want = ddpm_step(schedule, eps, x_t, t, noise)
    torch.testing.assert_close(ddpm_step(schedule, output, x_t, t, noise, parametrization), want, **close)


@pytest.mark.parametrize("t", [1, 10, 500, 999])
def test_ddim_with_eta_1_is_ddpm(t):
    schedule = NoiseSchedule()
    x_t, eps, noise = torch.randn(3, 2, 1, 4, 4, dtype=torch.float64)
    got = ddim_step(x_t, eps, schedule.alpha_bar(t), schedule.alpha_bar(t - 1), 1.0, noise)
    torch.testing.assert_close(got, ddpm_step(schedule, eps, x_t, t, noise))


def test_ddim_with_eta_0_keeps_image_and_noise():
    """The right eps takes x_t along the line of its own x0 and eps, however far the step."""
    schedule = NoiseSchedule()
    x0, eps = torch.randn(2, 2, 1, 4, 4, dtype=torch.float64)
    got = ddim_step(schedule.q_sample(x0, 900, eps), eps, schedule.alpha_bar(900), schedule.alpha_bar(40), 0.0, None)
    torch.testing.assert_close(got, schedule.q_sample(x0, 40, eps))


def test_q_sample_takes_each_image_to_its_own_t():
    schedule, (_, alpha_bar) = NoiseSchedule(), tables()
    x0, eps = torch.randn(2, 3, 1, 2, 2)
    got = schedule.q_sample(x0, torch.tensor([0, 500, 999]), eps)
    for b, t in enumerate((0, 500, 999)):
        want = alpha_bar[t].sqrt().float() * x0[b] + (1 - alpha_bar[t]).sqrt().float() * eps[b]
        torch.testing.assert_close(got[b], want)
    assert got.dtype == torch.float32
