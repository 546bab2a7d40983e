"""What eps and noise weigh in a step, against formulas written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from diffusion import NoiseSchedule
from diffusion.divergence import step_weights
from diffusion.solvers import make_solver, spaced_timesteps

BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).numpy()
ALPHA_BARS = np.append((1 - BETAS).cumprod(), 1.0)  # [-1] is the clean image


def weights(name, steps, **more):
    timesteps = spaced_timesteps(1000, steps)
    return timesteps, step_weights(make_solver(name, NoiseSchedule(), "predict_noise", **more), timesteps)


def test_every_timestep_of_ddpm_has_the_weight_of_the_variational_bound():
    timesteps, found = weights("ddpm", None)
    t = np.array(timesteps[:-1])
    variance = BETAS[t] * (1 - ALPHA_BARS[t - 1]) / (1 - ALPHA_BARS[t])
    expected = BETAS[t] ** 2 / (2 * variance * (1 - BETAS[t]) * (1 - ALPHA_BARS[t]))
    np.testing.assert_allclose(found.kl[:-1], expected, rtol=1e-9)
    assert not found.random[-1] and found.random[:-1].all()
    assert found.kl[-1] == math.inf


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_skipped_timesteps(eta):
    timesteps, found = weights("ddim", 20, eta=eta)
    for t, s, shift, std in zip(timesteps, [*timesteps[1:], -1], found.shift, found.std, strict=True):
        now, then = ALPHA_BARS[t], ALPHA_BARS[s]
        var = eta**2 * (1 - then) / (1 - now) * (1 - now / then)
        assert std == pytest.approx(math.sqrt(var), abs=1e-12)
        expected = math.sqrt(1 - then - var) - math.sqrt(then * (1 - now) / now)
        assert shift == pytest.approx(expected, rel=1e-9)
    if eta == 1:
        _, ancestral = weights("ddpm", 20)
        np.testing.assert_allclose(ancestral.shift, found.shift, rtol=1e-12)


def test_second_order_steps_weigh_more_by_the_extrapolation():
    """DPM-Solver++(2M), Lu et al. 2022, Algorithm 2: (1 + 1 / (2 r)) times the first-order step, r = h_before / h."""
    timesteps, found = weights("dpmsolver++", 10)
    _, first_order = weights("ddim", 10)
    lambdas = [0.5 * math.log(ALPHA_BARS[t] / (1 - ALPHA_BARS[t])) for t in timesteps]
    h = np.diff(lambdas)
    for i in (0, len(timesteps) - 1):  # the first and the last step are of first order
        assert found.shift[i] == pytest.approx(first_order.shift[i], rel=1e-5)
    for i in range(1, len(timesteps) - 1):
        assert found.shift[i] / first_order.shift[i] == pytest.approx(1 + h[i] / (2 * h[i - 1]), rel=1e-4)
    assert not found.random.any()


def test_the_solver_is_left_as_it_was():
    schedule = NoiseSchedule()
    solver = make_solver("unipc", schedule, "predict_original", clip_x0=True)
    step_weights(solver, spaced_timesteps(1000, 5))
    assert solver.parametrization == "predict_original" and solver.clip_x0
    assert solver.scheduler.last_sample is None
