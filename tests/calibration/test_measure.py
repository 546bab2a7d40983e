"""A case that is known exactly: Gaussian data, and networks that are off by a known linear error."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from calibration.choice import Steps, cascades, choose, switches
from calibration.measure import choose_images, measure_predictions
from calibration.run import weighed
from common.config import DiffusionConfig
from common.errors import InputError
from data.dataset import ImageDataset
from diffusion import NoiseSchedule
from diffusion.matching import own_timesteps, predicting_noise
from diffusion.solvers import make_solver, spaced_timesteps

MU, STD, N = 0.3, 0.5, 400
SHAPE = (1, 2, 3)
D = 6
TIMESTEPS = spaced_timesteps(1000, 8)
SCHEDULE = NoiseSchedule()
# What is added to the exact eps at t: slope x_t + offset. The last network is the full one; it is off too.
SLOPES = [lambda t: 0.02 + 0.3 * (1 - t / 999) ** 2, lambda t: 0.03 + 0.1 * (1 - t / 999) ** 2, lambda t: 0.01]
OFFSETS = [lambda t: 0.05, lambda t: -0.02, lambda t: 0.03 * t / 999]
COSTS = [1.0, 2.5, 4.0]


class Gaussian(ImageDataset):
    def __init__(self, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.images = MU + STD * torch.randn(N, *SHAPE, generator=generator, dtype=torch.float64)

    def __len__(self):
        return N

    def __getitems__(self, indices):
        return self.images[list(indices)], torch.zeros(len(indices), dtype=torch.long)

    def to_x0(self, images, mirrored, normal):
        return images

    def describe(self):
        return {}


def network(k: int):
    def denoiser(x_t, t, y):
        alpha_bar = float(SCHEDULE.alphas_cumprod[t])
        exact = (1 - alpha_bar) ** 0.5 / (alpha_bar * STD**2 + 1 - alpha_bar) * (x_t - alpha_bar**0.5 * MU)
        return exact + SLOPES[k](t) * x_t + OFFSETS[k](t)

    return denoiser


def measure(networks, seed: int, **more):
    solver = make_solver("ddpm", SCHEDULE, "predict_noise")
    return measure_predictions(
        *([network(k) for k in networks], [range(1000)] * len(networks), solver, TIMESTEPS, Gaussian(seed), range(N)),
        **{"conditional": False, "batch_size": 100, "seed": seed, "device": torch.device("cpu"), "quiet": True} | more,
    )


def mean_square_of_line(slope, offset, t: int) -> float:
    """E (slope x_t + offset)^2 for x_t ~ N(sqrt(alpha_bar) MU, alpha_bar STD^2 + 1 - alpha_bar)."""
    alpha_bar = np.linspace(1 - 1e-4, 1 - 0.02, 1000)[: t + 1].prod()
    return (slope * alpha_bar**0.5 * MU + offset) ** 2 + slope**2 * (alpha_bar * STD**2 + 1 - alpha_bar)


def exact_distance(k: int) -> np.ndarray:
    return np.array(
        [mean_square_of_line(SLOPES[k](t) - SLOPES[-1](t), OFFSETS[k](t) - OFFSETS[-1](t), t) for t in TIMESTEPS]
    )


def exact_excess(k: int) -> np.ndarray:
    """The error of the exact eps itself, and its product with a function of x_t, are the same for all networks."""
    return np.array(
        [
            mean_square_of_line(SLOPES[k](t), OFFSETS[k](t), t) - mean_square_of_line(SLOPES[-1](t), OFFSETS[-1](t), t)
            for t in TIMESTEPS
        ]
    )


def weights() -> np.ndarray:
    """Of all steps but the last, by the formula for two Gaussians of one variance."""
    alpha_bars = np.linspace(1 - 1e-4, 1 - 0.02, 1000).cumprod()
    found = []
    for t, s in itertools.pairwise(TIMESTEPS):
        now, then = alpha_bars[t], alpha_bars[s]
        var = (1 - then) / (1 - now) * (1 - now / then)
        found.append(((1 - then - var) ** 0.5 - (then * (1 - now) / now) ** 0.5) ** 2 / (2 * var))
    return np.array(found)


def steps_from(predictions, costs) -> Steps:
    steps, random = weighed(predictions, make_solver("ddpm", SCHEDULE, "predict_noise"), TIMESTEPS, costs)
    assert random
    return steps


def test_divergence_and_excess_are_the_closed_form():
    far = []
    for seed in range(12):
        steps = steps_from(measure([0, 2], seed), [1.0, 4.0])
        for n, option in enumerate(switches(steps)[1:], 1):
            divergence, excess = (weights() * exact(0)[:-1] for exact in (exact_distance, exact_excess))
            far.append((option.divergence - divergence[:n].sum()) / option.divergence_se)
            far.append((option.excess - excess[:n].sum()) / option.excess_se)
    far = np.array(far)
    assert np.abs(far).max() < 4.5
    # The standard errors are of the right size, neither too small nor generous.
    assert 0.7 < np.sqrt((far**2).mean()) < 1.4


@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize("networks", [[0, 2], [0, 1, 2]])
def test_the_schedule_is_the_known_best(networks, free):
    steps = steps_from(measure(networks, 0), [COSTS[k] for k in networks])
    exact = np.zeros((len(networks), len(TIMESTEPS)))
    for row, k in enumerate(networks[:-1]):
        exact[row] = [*(weights() * exact_distance(k)[:-1]), np.inf]
    every = [np.array(o) for o in itertools.product(range(len(networks)), repeat=len(TIMESTEPS))]
    every = [o for o in every if o[-1] == len(networks) - 1 and (free or (np.diff(o) >= 0).all())]
    places = np.arange(len(TIMESTEPS))
    in_order = not free and len(networks) == 2
    options = switches(steps) if in_order else cascades(steps, free)
    for option in options:
        chosen = choose(options, speed_up=option.speed_up - 1e-9)
        seconds = steps.costs[chosen.networks].sum()
        able = [o for o in every if steps.costs[o].sum() <= seconds + 1e-9]
        best = min(able, key=lambda o: exact[o, places].sum())
        assert chosen.networks.tolist() == best.tolist()


UNLIKE = (
    (DiffusionConfig(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012), "predict_noise"),
    (DiffusionConfig(beta_schedule="rectified_flow"), "predict_velocity"),
)
TABLE = np.log1p(-(np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)).cumsum()  # log alpha bar of scaled_linear


def told_its_own_time(x, own: float, t: int, k: int):
    """The output of a network of the process UNLIKE[k], off by the lines 2 k at each of the sampler's timesteps.

    From its own time alone it knows the noise level, by formulas of its own: scaled_linear between the entries of its
    table, or rectified flow, whose state and output are others than the sampler's.
    """
    if k:
        s = (own + 0.5) / 1000
        root = ((1 - s) ** 2 + s**2) ** 0.5
        signal, noise, x = (1 - s) / root, s / root, x / root  # it is shown (1 - s) x0 + s eps
    else:
        alpha_bar = np.exp(np.interp(own, np.arange(1000), TABLE))
        signal, noise = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
    exact = noise / (signal**2 * STD**2 + noise**2) * (x - signal * MU)
    eps = exact + SLOPES[2 * k](t) * x + OFFSETS[2 * k](t)
    return eps - (x - noise * eps) / signal if k else eps


def test_two_networks_of_unlike_schedules_and_outputs():
    """The divergence is that of the sampler's process, here the last network's: the closed form at its alpha bars."""
    schedule = NoiseSchedule(**UNLIKE[-1][0].schedule)
    # Where both networks were trained: nearer to noise the flow keeps less of the image than the other one's table.
    timesteps = [t for t in spaced_timesteps(1000, 16) if 20 < t < 930]
    solver, denoisers = make_solver("ddpm", schedule, "predict_noise"), []
    for k, (process, output) in enumerate(UNLIKE):
        own = own_timesteps(process, schedule, timesteps)
        denoisers.append(
            predicting_noise(lambda x, t, y, k=k, own=own: told_its_own_time(x, own[t], t, k), schedule, output)
        )

    s = (np.array(timesteps) + 0.5) / 1000
    alpha_bars = (1 - s) ** 2 / ((1 - s) ** 2 + s**2)
    # x_t is N(sqrt(alpha bar) MU, alpha bar STD^2 + 1 - alpha bar): the mean square of a line of it.
    slopes, offsets = (np.array([of[0](t) - of[2](t) for t in timesteps]) for of in (SLOPES, OFFSETS))
    distances = (slopes * alpha_bars**0.5 * MU + offsets) ** 2 + slopes**2 * (alpha_bars * STD**2 + 1 - alpha_bars)
    now, then = alpha_bars[:-1], alpha_bars[1:]
    var = (1 - then) / (1 - now) * (1 - now / then)
    nats = distances[:-1] * ((1 - then - var) ** 0.5 - (then * (1 - now) / now) ** 0.5) ** 2 / (2 * var)
    far = []
    for seed in range(12):
        predictions = measure_predictions(
            *(denoisers, [range(1000)] * 2, solver, timesteps, Gaussian(seed), range(N)),
            **{"conditional": False, "batch_size": 100, "seed": seed, "device": torch.device("cpu"), "quiet": True},
        )
        steps, _ = weighed(predictions, solver, timesteps, [1.0, 4.0])
        for n, option in enumerate(switches(steps)[1:], 1):
            far.append((option.divergence - nats[:n].sum()) / option.divergence_se)
    far = np.array(far)
    assert np.abs(far).max() < 4.5
    assert 0.7 < np.sqrt((far**2).mean()) < 1.4


def test_the_noise_belongs_to_the_image():
    one, other = measure([0, 2], 3), measure([0, 2], 3, batch_size=33)
    np.testing.assert_allclose(one.error, other.error, rtol=1e-12)
    assert not np.allclose(one.error, measure([0, 2], 4).error)


def test_a_network_is_not_asked_where_it_knows_nothing():
    solver, asked = make_solver("ddpm", SCHEDULE, "predict_noise"), set()

    def curious(x_t, t, y):
        asked.add(t)
        return network(0)(x_t, t, y)

    found = measure_predictions(
        *([curious, network(2)], [range(500, 1000), range(1000)], solver, TIMESTEPS, Gaussian(0), range(10)),
        **{"conditional": False, "batch_size": 10, "seed": 0, "device": torch.device("cpu"), "quiet": True},
    )
    assert asked == {t for t in TIMESTEPS if t >= 500}
    assert np.isnan(found.error[0, :, 0]).tolist() == [t < 500 for t in TIMESTEPS]
    assert np.isfinite(found.error[1]).all() and found.dimensions == D


def test_images_are_chosen_by_the_seed():
    dataset = Gaussian(0)
    assert choose_images(dataset, 20, 1) == choose_images(dataset, 20, 1) != choose_images(dataset, 20, 2)
    assert choose_images(dataset, N, 0) == list(range(N))
    with pytest.raises(InputError, match=f"--n_images {N + 1}: the dataset has {N}"):
        choose_images(dataset, N + 1, 0)
