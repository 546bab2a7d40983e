"""Networks of unlike noise schedules and outputs in one run, on Gaussian data, where the perfect network is known.

Of data N(MEAN, STD^2) the expectation of the noise in a noisy number is linear in it. A perfect network of each process
is told its own time alone, finds its own signal and noise from that by a formula of its own, and gives its own output.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from common.config import SAMPLING_SCHEDULES, DiffusionConfig
from diffusion import NoiseSchedule, time_input
from diffusion.ddpm import network_input, training_target
from diffusion.matching import own_timesteps, predicting_noise
from diffusion.sampling import Stage, sample, split_timesteps
from diffusion.solvers import make_solver, spaced_timesteps

MEAN, STD = 0.3, 0.5
T = 200
SCHEDULES = ("linear", "scaled_linear", "cosine", "rectified_flow")
OUTPUTS = ("predict_noise", "predict_original", "predict_v", "predict_velocity")


def config(name: str, **more) -> DiffusionConfig:
    """The betas of 1,000 timesteps, in T of them."""
    given = SAMPLING_SCHEDULES[name]
    scaled = {key: given[key] * 1000 / T if name in ("linear",) else given[key] for key in ("beta_start", "beta_end")}
    return DiffusionConfig(num_timesteps=T, beta_schedule=name, **scaled, **more)


def log_alpha_bars(of: DiffusionConfig) -> np.ndarray:
    """(T,) float64, written out by numpy."""
    k = np.arange(T)
    if of.beta_schedule == "rectified_flow":
        s = (k + 0.5) / T
        return 2 * np.log(1 - s) - np.log((1 - s) ** 2 + s**2)
    if of.beta_schedule == "cosine":
        f = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - f[1:] / f[:-1], 0.999)
    elif of.beta_schedule == "linear":
        betas = np.linspace(of.beta_start, of.beta_end, T)
    else:
        betas = np.linspace(of.beta_start**0.5, of.beta_end**0.5, T) ** 2
    return np.log1p(-betas).cumsum()


class Perfect:
    """The best network for Gaussian data of one process. Called with its own time; knows nothing of the sampler."""

    def __init__(self, of: DiffusionConfig, output: str):
        self.of, self.output, self.table = of, output, log_alpha_bars(of)

    def alpha_bar(self, own: float) -> float:
        """At its own timestep, between the integers and beyond them as the process is continued."""
        if self.of.beta_schedule == "rectified_flow":
            s = (own + 0.5) / T
            return (1 - s) ** 2 / ((1 - s) ** 2 + s**2)
        before = int(np.clip(np.floor(own), 0, T - 2))
        return float(np.exp(self.table[before] + (own - before) * (self.table[before + 1] - self.table[before])))

    def __call__(self, x: torch.Tensor, own: float) -> torch.Tensor:
        alpha_bar = self.alpha_bar(own)
        a, b = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
        if self.output == "predict_velocity":
            x = x * (a + b)  # it is shown (1 - s) x0 + s eps, with (1 - s) / s = a / b
        variance = a**2 * STD**2 + b**2
        eps = b * (x - a * MEAN) / variance
        x0 = MEAN + a * STD**2 * (x - a * MEAN) / variance
        return {
            "predict_noise": eps,
            "predict_original": x0,
            "predict_v": a * eps - b * x0,
            "predict_velocity": eps - x0,
        }[self.output]


def denoiser_of(of: DiffusionConfig, output: str, schedule: NoiseSchedule, timesteps):
    network, own = Perfect(of, output), own_timesteps(of, schedule, timesteps)
    return predicting_noise(lambda x_t, t, y: network(x_t, own[t]), schedule, output)


class Drawn:
    """The same noise at each call of the same number."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape):
        return torch.randn(64, *shape, generator=self.generator, dtype=torch.float64)


def sampled(stages, solver):
    return sample(stages, solver, Drawn(), (1, 1, 1))


@pytest.mark.parametrize("solver_name", ["ddpm", "ddim", "dpmsolver++", "unipc"])
@pytest.mark.parametrize("sampling", SCHEDULES)
def test_every_pair_samples_what_one_perfect_network_samples(sampling, solver_name):
    """Both stages say the same of the noise as the sampler's own perfect network, so every image is the same."""
    own = config(sampling)
    schedule = NoiseSchedule(**own.schedule)
    # From where every process has such an alpha bar: beyond, a network would be asked about more noise than it knows.
    timesteps = [t for t in spaced_timesteps(T, 25) if schedule.alpha_bar(t) > 0.006]
    solver = make_solver(solver_name, schedule, "predict_noise")
    one = Stage(denoiser_of(own, "predict_noise", schedule, timesteps), timesteps)
    split = split_timesteps(timesteps, [timesteps[len(timesteps) // 2], 0])
    # A switch makes multistep solvers forget: what is compared with forgets there as well.
    wanted = sampled([Stage(one.denoiser, part) for part in split], solver)
    for early, late in itertools.product(itertools.product(SCHEDULES, OUTPUTS), repeat=2):
        parts = [denoiser_of(config(name), output, schedule, timesteps) for name, output in (early, late)]
        made = sampled([Stage(part, visited) for part, visited in zip(parts, split, strict=True)], solver)
        torch.testing.assert_close(made, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_tables(name):
    schedule = NoiseSchedule(**config(name).schedule)
    np.testing.assert_allclose(schedule.alphas_cumprod.log().numpy(), log_alpha_bars(config(name)), rtol=1e-9)
    for t in (0, 1, 57, T - 1):
        assert schedule.timestep_at(schedule.alpha_bar(t)) == pytest.approx(t, abs=1e-6)


def test_time_of_networks_that_run_from_noise_to_data():
    """SiT is told 1 - s."""
    of = config("rectified_flow", time_scale=1 / T, time_shift=0.5, toward_data=True)
    for s in (0.01, 0.3, 0.77, 0.999):
        alpha_bar = (1 - s) ** 2 / ((1 - s) ** 2 + s**2)
        assert time_input(of, alpha_bar) == pytest.approx(1 - s)


@pytest.mark.parametrize("output", OUTPUTS)
def test_targets_lead_back_to_the_noise(output):
    """A network that predicts its target perfectly predicts the noise perfectly."""
    schedule = NoiseSchedule(**config("cosine").schedule)
    x0, eps = torch.randn(2, 5, 1, 2, 2, dtype=torch.float64)
    t = torch.full((5,), 83)
    x_t = schedule.q_sample(x0, t, eps)
    target = training_target(schedule, x0, x_t, t, eps, output)
    seen = []
    denoiser = predicting_noise(lambda x, t, y: seen.append(x) or target, schedule, output)
    torch.testing.assert_close(denoiser(x_t, 83, None), eps)
    alpha_bar = schedule.alpha_bar(83)
    if output == "predict_velocity":
        s = (1 - alpha_bar) ** 0.5 / ((1 - alpha_bar) ** 0.5 + alpha_bar**0.5)
        torch.testing.assert_close(seen[0], (1 - s) * x0 + s * eps)
        torch.testing.assert_close(network_input(alpha_bar, x_t, output), seen[0])
    else:
        assert seen[0] is x_t


def test_a_velocity_toward_data():
    schedule = NoiseSchedule(**config("rectified_flow").schedule)
    x0, eps = torch.randn(2, 3, 1, 2, 2, dtype=torch.float64)
    x_t = schedule.q_sample(x0, 60, eps)
    denoiser = predicting_noise(lambda x, t, y: x0 - eps, schedule, "predict_velocity", toward_data=True)
    torch.testing.assert_close(denoiser(x_t, 60, None), eps)
