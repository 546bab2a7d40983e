"""The price of what remembers, where it is known: Gaussian data, and networks that are off by a linear error.

The joint distribution of a path at several timesteps is Gaussian, so that the error of any forecast, a line in the x_t
of these timesteps, has a mean square in closed form.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from calibration.measure import Walk
from calibration.plan import measure_plan
from calibration.prices import GivenMiddle, Predictors, Seconds, Source, measure_divergence, ways_of
from diffusion.forecast import Forecast, corrected, held
from diffusion.solvers import make_solver
from generation.denoisers import reusing
from generation.settings import SavingSettings
from tests.calibration.test_measure import MU, OFFSETS, SCHEDULE, SLOPES, STD, TIMESTEPS, Gaussian, N, network, weights

CPU = torch.device("cpu")
ALPHA_BARS = np.linspace(1 - 1e-4, 1 - 0.02, 1000).cumprod()


def middle_slope(t: int) -> float:
    return 0.2 + 0.3 * t / 999


class Line:
    """A linear function of the path: the sum of slope x_t over some t, plus an offset."""

    def __init__(self, slopes: dict[int, float], offset: float = 0.0):
        self.slopes, self.offset = slopes, offset

    def __add__(self, other: Line) -> Line:
        both = {t: self.slopes.get(t, 0) + other.slopes.get(t, 0) for t in {*self.slopes, *other.slopes}}
        return Line(both, self.offset + other.offset)

    def __mul__(self, factor: float) -> Line:
        return Line({t: factor * slope for t, slope in self.slopes.items()}, factor * self.offset)

    def mean_square(self) -> float:
        """Of x_t along a forward path: Cov(x_t, x_s) = sqrt(alpha_bar_t / alpha_bar_s) Var(x_s) for t > s."""
        mean, var = self.offset, 0.0
        for t, slope in self.slopes.items():
            mean += slope * ALPHA_BARS[t] ** 0.5 * MU
            for s, other in self.slopes.items():
                clean, noisy = min(s, t), max(s, t)
                var_clean = ALPHA_BARS[clean] * STD**2 + 1 - ALPHA_BARS[clean]
                var += slope * other * (ALPHA_BARS[noisy] / ALPHA_BARS[clean]) ** 0.5 * var_clean
        return mean**2 + var


def eps_line(k: int, t: int) -> Line:
    """What network k of the test says at t."""
    alpha_bar = ALPHA_BARS[t]
    exact = (1 - alpha_bar) ** 0.5 / (alpha_bar * STD**2 + 1 - alpha_bar)
    return Line({t: exact + SLOPES[k](t)}, OFFSETS[k](t) - exact * alpha_bar**0.5 * MU)


def remembered(kind: str, t: int) -> Line:
    if kind == "hold":
        return eps_line(2, t)
    if kind == "correct":
        return eps_line(2, t) + eps_line(0, t) * -1
    return Line({t: middle_slope(t)})


def forecast_error(kind: str, step: int, age: int, every: int, order: int) -> Line:
    """Of the forecast of what is remembered, from the values at `age` steps before, and `every` before that."""
    t, last = TIMESTEPS[step], TIMESTEPS[step - age]
    forecast = remembered(kind, last)
    if order:
        before = TIMESTEPS[step - age - every]
        along = (t - last) / (last - before)
        forecast = forecast * (1 + along) + remembered(kind, before) * -along
    return forecast + remembered(kind, t) * -1


def around(x_t, t, y, residual):
    """The full network with a middle that adds a line in x_t."""
    added = middle_slope(t) * x_t
    outer = network(2)(x_t, t, y) - added
    return outer + (added if residual is None else residual), added


def predictors() -> Predictors:
    middle = GivenMiddle(around)
    return Predictors([network(0), middle], [SavingSettings(), SavingSettings()], {}, {1: middle})


def walk(seed: int) -> Walk:
    solver = make_solver("ddpm", SCHEDULE, "predict_noise")
    return Walk(
        *(predictors().networks[-1], solver, TIMESTEPS, Gaussian(seed), range(N)),
        **{"conditional": False, "batch_size": 100, "seed": seed, "device": CPU, "quiet": True},
    )


KNOWN = [range(1000), range(1000)]
WEIGHTS = np.append(weights(), 1.0)  # the last step is not looked at
SOURCES = [
    Source(kind, 0 if kind == "correct" else 1, order=order, age=age, every=every if order else 0)
    for kind in ("hold", "correct", "reuse")
    for every in (2, 3)
    for order in (0, 1)
    for age in range(1, every)
]


def measured(seed: int) -> np.ndarray:
    of, way = predictors(), walk(seed)
    way.full = of.networks[-1]
    return measure_divergence(of, KNOWN, SOURCES, way, WEIGHTS)


def test_every_forecast_costs_its_closed_form():
    far = []
    for seed in range(8):
        found = measured(seed)
        for row, source in zip(found, SOURCES, strict=True):
            first = source.age + source.every
            assert np.isnan(row[:first]).all(), "nothing was computed so long before"
            for step in range(first, len(TIMESTEPS) - 1):
                of_path = row[step].astype(float)
                error = forecast_error(source.kind, step, source.age, source.every, source.order)
                exact = WEIGHTS[step] * error.mean_square()
                far.append((of_path.mean() - exact) / (of_path.std(ddof=1) / N**0.5))
    far = np.array(far)
    assert np.abs(far).max() < 5
    assert 0.7 < np.sqrt((far**2).mean()) < 1.4


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("kind", ["hold", "correct", "reuse"])
def test_a_whole_plan_costs_the_sum_of_its_steps(kind, every, order):
    """As it runs, over all steps but the last, which adds no noise."""
    steps = TIMESTEPS[:-1]
    forecast = Forecast([steps], every, order)
    full = network(2)
    denoiser = {
        "hold": lambda: held(full, forecast),
        "correct": lambda: corrected(full, network(0), forecast),
        "reuse": lambda: reusing(around, forecast),
    }[kind]()
    exact = 0.0
    for step in range(len(steps)):
        age = step % every
        if age:
            able = order and step - age - every >= 0
            exact += WEIGHTS[step] * forecast_error(kind, step, age, every, int(able)).mean_square()
    found = [measure_plan([*[denoiser] * len(steps), full], walk(seed), WEIGHTS, 0.0, CPU) for seed in range(4)]
    if every == 1:
        assert all(plan.divergence < 1e-25 for plan in found), "but for rounding it is the plain network"
        return
    far = np.array([(plan.divergence - exact) / plan.divergence_se for plan in found])
    assert np.abs(far).max() < 4.5


class FirstBroken(Gaussian):
    def whole_and_broken(self, indices):
        return self.__getitems__(indices)[0], {index: "broken" for index in indices if index == 0}


def test_the_first_batch_times_a_plan_whatever_image_is_broken():
    """The full network runs at each step of each batch for the path; in the first once more, for its time."""
    calls = []

    def full(x_t, t, y):
        calls.append(len(x_t))
        return network(2)(x_t, t, y)

    path = walk(0)
    path.full, path.dataset = full, FirstBroken(0)
    found = measure_plan([network(2)] * len(TIMESTEPS), path, WEIGHTS, 0.0, CPU)
    assert np.isfinite(found.speed_up) and found.divergence < 1e-25
    assert calls == [99] * 2 * len(TIMESTEPS) + [100] * 3 * len(TIMESTEPS)


def test_ways_and_their_rows():
    """A way of interval k costs k calls of one kind and another, and begins with what it computes itself."""
    seconds = Seconds([1.0, 4.0], {}, {1: 2.0}, 0.1)
    ways, sources = ways_of(predictors(), seconds, ["shallow", "full"])
    assert ways[0].name == "full" and sources[ways[0].rows[0, 0]] == Source("network", 1)
    by_name = {way.name: way for way in ways}
    assert "full held, every 4" in by_name and "shallow" in by_name
    corrected_4 = by_name["full by shallow, corrected, every 4, extrapolated"]
    assert corrected_4.seconds.tolist() == [5, 1, 1, 1]
    assert corrected_4.saving == SavingSettings(correct_every=4, correct_order=1)
    assert (corrected_4.network, corrected_4.cheap) == (1, 0)
    first, later = ([sources[row] for row in rows] for rows in corrected_4.rows)
    assert first == [Source("network", 1), *(Source("correct", 0, age=age) for age in (1, 2, 3))]
    assert later == [Source("network", 1), *(Source("correct", 0, order=1, age=age, every=4) for age in (1, 2, 3))]
    reused = by_name["full with its middle reused, every 3"]
    assert reused.seconds.tolist() == [4, 2, 2]
    assert reused.saving == SavingSettings(reuse_every=3, reuse_order=0, reuse_outer=1)
    assert all(way.seconds.mean() < 4 for way in ways[1:]), "what is no quicker than the full network is left out"


def test_the_path_of_data_is_the_forward_chain():
    """Covariances of x_t at every two timesteps, of 20,000 paths."""
    from diffusion.paths import DataPath

    generator = torch.Generator().manual_seed(0)

    def draw() -> torch.Tensor:
        return torch.randn(20_000, 1, 1, 1, generator=generator, dtype=torch.float64)

    solver = make_solver("ddpm", SCHEDULE, "predict_noise")
    path = DataPath(solver, MU + STD * draw())
    x_t = path.start(TIMESTEPS[0], draw)
    visited = [x_t.flatten()]
    for t, s in itertools.pairwise(TIMESTEPS):
        x_t = path.onward(x_t, x_t, t, s, draw)
        visited.append(x_t.flatten())
    found = np.cov(torch.stack(visited).numpy())
    for (i, t), (j, s) in itertools.product(enumerate(TIMESTEPS), repeat=2):
        clean, noisy = min(s, t), max(s, t)
        exact = (ALPHA_BARS[noisy] / ALPHA_BARS[clean]) ** 0.5 * (ALPHA_BARS[clean] * STD**2 + 1 - ALPHA_BARS[clean])
        assert found[i, j] == pytest.approx(exact, abs=0.03)
