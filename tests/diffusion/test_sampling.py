from __future__ import annotations

import functools
import itertools
import math
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from common.errors import InputError
from common.seeds import nth_seed
from common.solvers import SOLVERS as KNOWN
from common.solvers import Entry
from diffusion import NoiseSchedule
from diffusion.sampling import FiniteWatch, SeededNoise, Stage, guided, random_classes, sample, split_timesteps
from diffusion.solvers import Solver, make_solver, spaced_timesteps

SHAPE = (1, 2, 2)
ALPHA_BARS = np.append((1 - np.linspace(1e-4, 0.02, 1000)).cumprod(), 1.0)  # [-1] is the clean image
SOLVERS = ["ddpm", "ddim", "dpmsolver++", "unipc"]


def stages_of(denoisers, timesteps, lowest=(0,)):
    """A stage for each denoiser, down to its lowest t."""
    own = split_timesteps(timesteps, lowest)
    return [Stage(denoiser, visited) for denoiser, visited in zip(denoisers, own, strict=True)]


class Recorder:
    """A denoiser that notes the t it was called with."""

    def __init__(self):
        self.seen = []

    def __call__(self, x_t, t, y):
        self.seen.append(t)
        return torch.zeros_like(x_t)


@pytest.mark.parametrize("t_switch, full_runs", [(-1, 0), (0, 1), (300, 301), (999, 1000)])
def test_which_network_runs_at_which_t(t_switch, full_runs):
    shallow, full = Recorder(), Recorder()
    stages = stages_of([shallow, full], spaced_timesteps(1000, None), [t_switch + 1, 0])
    sample(stages, Solver("ddpm", NoiseSchedule()), SeededNoise([0]), SHAPE)
    assert shallow.seen == [t for t in range(999, -1, -1) if t > t_switch]
    assert full.seen == [t for t in range(999, -1, -1) if t <= t_switch]
    assert [len(stage.timesteps) for stage in stages] == [1000 - full_runs, full_runs]


def test_the_switch_is_a_timestep_also_with_few_steps():
    shallow, full = Recorder(), Recorder()
    stages = stages_of([shallow, full], spaced_timesteps(1000, 4), [500, 0])
    sample(stages, Solver("ddim", NoiseSchedule()), SeededNoise([0]), SHAPE)
    assert (shallow.seen, full.seen) == ([999, 749], [499, 249])


def test_three_stages():
    networks = [Recorder() for _ in range(3)]
    stages = stages_of(networks, spaced_timesteps(1000, None), [601, 201, 0])
    sample(stages, Solver("ddim", NoiseSchedule()), SeededNoise([0]), SHAPE)
    assert [(n.seen[0], n.seen[-1]) for n in networks] == [(999, 601), (600, 201), (200, 0)]


@pytest.mark.parametrize("lowest", [[0], [1000, 0], [999, 998, 5, 0], [400, 400, 0]])
def test_each_timestep_is_in_one_stage(lowest):
    timesteps = spaced_timesteps(1000, 333)
    own = split_timesteps(timesteps, lowest)
    assert [t for visited in own for t in visited] == timesteps
    assert all(t >= least for visited, least in zip(own, lowest, strict=True) for t in visited)


def test_stages_are_walked_in_order():
    """The solver begins once, and forgets at the start of each stage; each session is entered once, and left."""
    happened = []

    class Watched(Solver):
        def begin(self, timesteps):
            happened.append(("begin", list(timesteps)))

        def forget(self):
            happened.append("forget")

        def step(self, model_output, x_t, t, s, draw_noise):
            happened.append(("step", t, s))
            return x_t

    def stage(name, *timesteps):
        @contextmanager
        def session():
            happened.append(f"enter {name}")
            yield
            happened.append(f"leave {name}")

        def denoiser(x_t, t, y):
            happened.append((name, t))
            return x_t

        return Stage(denoiser, timesteps, session)

    stages = [stage("a", 9, 7), stage("b", 4), stage("a again", 2, 0)]
    for _ in range(2):
        happened.clear()
        sample(
            stages, Watched("ddim", NoiseSchedule()), SeededNoise([0]), SHAPE,
            on_step=lambda t, x: happened.append(("on_step", t)),
        )  # fmt: skip
        assert happened == [
            ("begin", [9, 7, 4, 2, 0]),
            *("forget", "enter a"),
            *(("on_step", 9), ("a", 9), ("step", 9, 7), ("on_step", 7), ("a", 7), ("step", 7, 4)),
            *("leave a", "forget", "enter b"),
            *(("on_step", 4), ("b", 4), ("step", 4, 2)),
            *("leave b", "forget", "enter a again"),
            *(("on_step", 2), ("a again", 2), ("step", 2, 0), ("on_step", 0), ("a again", 0), ("step", 0, -1)),
            "leave a again",
        ]


def test_a_session_ends_with_what_the_network_raises():
    left = []

    @contextmanager
    def session():
        try:
            yield
        finally:
            left.append(True)

    def denoiser(x_t, t, y):
        raise MemoryError

    with pytest.raises(MemoryError):
        sample([Stage(denoiser, [9], session)], Solver("ddim", NoiseSchedule()), SeededNoise([0]), SHAPE)
    assert left == [True]


class Wrapped(torch.nn.Module):
    def __init__(self, denoiser):
        super().__init__()
        self.denoiser = denoiser

    def forward(self, x_t, t, y):
        return self.denoiser(x_t, t, y)


WRAPPERS = [
    Wrapped,
    lambda denoiser: lambda *inputs: denoiser(*inputs),
    functools.partial(functools.partial, lambda of, *inputs: of(*inputs)),
    lambda denoiser: guided(lambda x, t, y: denoiser(x, t, None), 0.5, no_class=0),  # cond and uncond are the same
]


@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("name", SOLVERS)
def test_a_wrapped_denoiser_is_sampled_like_the_plain_one(name, wrap):
    """What the solver remembers of one network must not reach the next, whatever hides the networks."""
    outputs = {t: torch.randn(2, *SHAPE).tanh() for t in (999, 749, 499, 249)}

    def early(x_t, t, y):
        return outputs[t].repeat(len(x_t) // 2, 1, 1, 1) + 0.1 * x_t

    def late(x_t, t, y):
        return outputs[t].repeat(len(x_t) // 2, 1, 1, 1) - 0.1 * x_t

    def either(x_t, t, y):
        return (early if t > 499 else late)(x_t, t, y)

    def run(denoisers, lowest):
        solver = make_solver(name, NoiseSchedule(), "predict_original")
        stages, y = stages_of(denoisers, list(outputs), lowest), torch.tensor([1, 1])
        return sample(stages, solver, SeededNoise([1, 2]), SHAPE, y)

    plain = run([early, late], [500, 0])
    torch.testing.assert_close(run([wrap(early), wrap(late)], [500, 0]), plain)
    # As one stage the same networks give other images where the solver remembers: the case is of use.
    assert torch.equal(run([either], [0]), plain) == (name in ("ddpm", "ddim"))


@pytest.mark.parametrize("steps", [1, 2, 20, 50, 333, 1000])
def test_spaced_timesteps_start_with_pure_noise_and_fall_evenly(steps):
    timesteps = spaced_timesteps(1000, steps)
    assert len(timesteps) == steps and timesteps[0] == 999
    gaps = [a - b for a, b in itertools.pairwise([*timesteps, -1])]
    assert min(gaps) >= 1 and max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("steps", [0, 1001])
def test_more_steps_than_timesteps_are_refused(steps):
    with pytest.raises(InputError, match="wanted 1"):
        spaced_timesteps(1000, steps)


class ExactGaussian:
    """The eps of data N(0.3, 0.5^2), which is known: the noise expected given x_t; or the x0 that goes with it."""

    def __init__(self, schedule, parametrization="predict_noise"):
        self.schedule, self.parametrization = schedule, parametrization

    def __call__(self, x_t, t, y):
        a = self.schedule.alpha_bar(t)
        eps = (1 - a) ** 0.5 * (x_t - a**0.5 * 0.3) / (a * 0.25 + 1 - a)
        return eps if self.parametrization == "predict_noise" else (x_t - (1 - a) ** 0.5 * eps) / a**0.5


def sampled_distribution(stages, solver, draws):
    """Mean and standard deviation of the images, exactly: with that network a sampler is a linear map of its noise.

    It is known by its answers to no noise, and to a 1 in each of the draws alone.
    """
    calls = itertools.count()

    def noise(*shape):
        impulse = torch.zeros(draws + 1, *shape)
        impulse[next(calls)] = 1
        return impulse

    *answers, mean = sample(stages, solver, noise, (1, 1, 1)).flatten().double()
    assert next(calls) == draws
    return mean.item(), torch.stack(answers).sub(mean).norm().item()


def expected_x0(x, a):
    """Of data N(0.3, 0.5^2), given x = sqrt(a) x0 + sqrt(1 - a) eps: the regression of x0 on x."""
    return 0.3 + 0.25 * math.sqrt(a) / (0.25 * a + 1 - a) * (x - 0.3 * math.sqrt(a))


def distribution_of_ddim(timesteps, eta):
    """Mean and standard deviation, from step to step. DDIM (Song et al. 2021), Eq. 12 with sigma from Eq. 16."""
    mean, var = 0.0, 1.0
    for t, s in itertools.pairwise([*timesteps, -1]):
        a, b = ALPHA_BARS[t], ALPHA_BARS[s]
        drawn = eta**2 * (1 - b) / (1 - a) * (1 - a / b)
        of_x0 = 0.25 * math.sqrt(a) / (0.25 * a + 1 - a)  # slopes in x_t
        of_eps = math.sqrt(1 - a) / (0.25 * a + 1 - a)
        slope = math.sqrt(b) * of_x0 + math.sqrt(1 - b - drawn) * of_eps
        mean = math.sqrt(b) * 0.3 + slope * (mean - 0.3 * math.sqrt(a))
        var = slope**2 * var + drawn
    return mean, math.sqrt(var)


@pytest.mark.parametrize("steps", [20, 50, 1000])
@pytest.mark.parametrize("name, eta", [("ddpm", 0), ("ddim", 0), ("ddim", 0.5), ("ddim", 1)])
def test_the_exact_network_gives_the_distribution_of_the_data(name, eta, steps):
    """But for what the solver's own steps lack of it: less and less the more there are."""
    schedule, timesteps = NoiseSchedule(), spaced_timesteps(1000, steps)
    random = name == "ddpm" or eta > 0
    stages, solver = [Stage(ExactGaussian(schedule), timesteps)], Solver(name, schedule, eta=eta)
    mean, std = sampled_distribution(stages, solver, draws=steps if random else 1)
    wanted = distribution_of_ddim(timesteps, 1.0 if name == "ddpm" else eta)
    assert (mean, std) == (pytest.approx(wanted[0], abs=1e-4), pytest.approx(wanted[1], abs=1e-4))
    assert mean == pytest.approx(0.3, abs=0.01) and 0.5 - 4 / steps < std < 0.5


def dpm_solver(x, timesteps, restarts):
    """DPM-Solver++(2M), Lu et al. 2022, Algorithm 2, from x to the clean image.

    restarts: the timesteps of first-order steps.
    """
    before = h_before = None
    for t, s in itertools.pairwise(timesteps):
        (alpha, sigma, lam), (alpha_s, sigma_s, lam_s) = at(t), at(s)
        x0, h = expected_x0(x, alpha**2), lam_s - lam
        d = x0 if t in restarts else x0 + (x0 - before) * h / (2 * h_before)
        x = sigma_s / sigma * x - alpha_s * math.expm1(-h) * d
        before, h_before = x0, h
    return expected_x0(x, ALPHA_BARS[timesteps[-1]])


def unipc(x, timesteps, restarts):
    """UniPC of order 2, Zhao et al. 2023, Algorithms 5 to 8 on predictions of x0 with B(h) = e^h - 1 (bh2)."""
    last = None  # x, x0 and timestep before the step that led here, and the x0 before those if it was of order 2
    for t, s in itertools.pairwise(timesteps):
        (_, sigma, lam), (alpha_s, sigma_s, lam_s) = at(t), at(s)
        x0 = expected_x0(x, ALPHA_BARS[t])
        if t in restarts:
            last = None
        else:
            x = corrected(x0, t, *last)
        h = lam_s - lam
        slope = None if last is None else (last[1] - x0) / (at(last[2])[2] - lam)  # of x0 in lambda
        d = x0 if slope is None else x0 + 0.5 * h * slope
        last = (x, x0, t, None if slope is None else (slope, at(last[2])[2]))
        x = sigma_s / sigma * x - alpha_s * math.expm1(-h) * d
    return expected_x0(x, ALPHA_BARS[timesteps[-1]])


def corrected(x0_here, t, x, x0, t_before, memory):
    """x at t once more, from x at t_before, now that the network's x0 at t is known."""
    (_, sigma, lam), (alpha_t, sigma_t, lam_t) = at(t_before), at(t)
    h = lam_t - lam
    if memory is None:
        d = x0 + 0.5 * (x0_here - x0)
    else:  # weights that are right for each x0 quadratic in lambda
        slope, lam_earlier = memory
        r = (lam_earlier - lam) / h
        first = math.expm1(-h) / -h - 1
        moments = np.array([first, 2 * (first / -h - 0.5)]) / math.expm1(-h)
        weights = np.linalg.solve([[1, 1], [r, 1]], moments)
        d = x0 + weights[0] * slope * h + weights[1] * (x0_here - x0)
    return sigma_t / sigma * x - alpha_t * math.expm1(-h) * d


def at(t):
    """alpha, sigma and lambda, half the logarithm of the signal-to-noise ratio."""
    a = ALPHA_BARS[t]
    return math.sqrt(a), math.sqrt(1 - a), 0.5 * math.log(a / (1 - a))


@pytest.mark.parametrize("parametrization", ["predict_noise", "predict_original"])
@pytest.mark.parametrize("steps", [5, 20, 50])
@pytest.mark.parametrize("name, formula", [("dpmsolver++", dpm_solver), ("unipc", unipc)])
@pytest.mark.parametrize("t_switch", [None, 500])
def test_multistep_solvers_with_the_exact_network(name, formula, steps, parametrization, t_switch):
    """Against the papers' formulas, which are linear in x: two starts tell all. They come nearer to 0.5 than DDIM."""
    schedule, timesteps = NoiseSchedule(), spaced_timesteps(1000, steps)
    lowest = [0] if t_switch is None else [t_switch + 1, 0]
    stages = stages_of([ExactGaussian(schedule, parametrization) for _ in lowest], timesteps, lowest)
    solver = make_solver(name, schedule, parametrization)
    start, one = (formula(x, timesteps, {stage.timesteps[0] for stage in stages}) for x in (0.0, 1.0))
    for _ in range(2):  # nothing of one batch is left in the next
        mean, std = sampled_distribution(stages, solver, draws=1)
        assert (mean, std) == (pytest.approx(start, abs=1e-4), pytest.approx(abs(one - start), abs=1e-4))
    ddim = distribution_of_ddim(timesteps, 0.0)[1]
    assert abs(std - 0.5) < abs(ddim - 0.5)


@pytest.mark.parametrize("name", ["dpmsolver++", "unipc"])
def test_the_first_step_after_a_switch_is_of_first_order(name):
    """A first-order step in predictions of x0 is DDIM's, and knows nothing of what the network before said."""
    schedule, timesteps = NoiseSchedule(), [999, 749, 499, 249]
    outputs = torch.randn(4, 1, *SHAPE)
    steps = iter(outputs)
    states = []
    networks = [lambda x, t, y: next(steps)] * 2
    sample(
        stages_of(networks, timesteps, [500, 0]), make_solver(name, schedule, "predict_original"),
        SeededNoise([1]), SHAPE, on_step=lambda t, x: states.append(x),
    )  # fmt: skip
    want = Solver("ddim", schedule, "predict_original").step(outputs[2], states[2], 499, 249, lambda: None)
    torch.testing.assert_close(states[3], want, rtol=1e-4, atol=1e-5)
    other = Solver("ddim", schedule, "predict_original").step(outputs[1], states[1], 749, 499, lambda: None)
    assert not torch.allclose(states[2], other, atol=1e-3), "the second step should have been of second order"


def test_solvers_that_skip_timesteps_need_a_parametrization_that_can():
    with pytest.raises(InputError, match="predict_previous"):
        make_solver("unipc", NoiseSchedule(), "predict_previous")


class Halving(Solver):
    def step(self, model_output, x_t, t, s, draw_noise):
        return x_t / 2


def test_an_entry_is_all_that_a_new_solver_needs(monkeypatch):
    monkeypatch.setitem(KNOWN, "halving", Entry(__name__, "Halving", 7))
    solver = make_solver("halving", NoiseSchedule(), "predict_noise")
    noise = SeededNoise([0])(*SHAPE)
    images = sample([Stage(Recorder(), [999, 499, 99])], solver, SeededNoise([0]), SHAPE)
    torch.testing.assert_close(images, noise / 8)
    with pytest.raises(InputError, match="halving"):
        make_solver("doubling", NoiseSchedule(), "predict_noise")


def test_clip_x0_holds_the_image_in_range():
    schedule = NoiseSchedule()
    wild = lambda x_t, t, y: torch.full_like(x_t, 3.0)  # noqa: E731
    for name in ("ddpm", "ddim"):
        timesteps = spaced_timesteps(1000, 10)
        free, held = (
            sample(
                [Stage(wild, timesteps)],
                Solver(name, schedule, "predict_original", clip_x0=clip),
                SeededNoise([0]),
                SHAPE,
            )
            for clip in (False, True)
        )
        assert torch.allclose(held, torch.ones(1, *SHAPE)) and torch.allclose(free, 3 * torch.ones(1, *SHAPE))


def test_noise_belongs_to_its_seed():
    together, alone = SeededNoise([5, 6, 7]), SeededNoise([6])
    for _ in range(3):
        assert torch.equal(together(*SHAPE)[1], alone(*SHAPE)[0])


def test_seeds_of_a_run_are_its_own():
    seeds = [nth_seed(3, "samples", i) for i in range(50_000)]
    assert len(set(seeds)) == 50_000 and max(seeds) < 2**32
    assert nth_seed(3, "training steps", 0) != seeds[0] != nth_seed(4, "samples", 0)


def test_classes_follow_from_seed_and_index():
    together = random_classes(range(10), 1, range(200))
    assert torch.equal(together[50:60], random_classes(range(10), 1, range(50, 60)))
    assert set(together.tolist()) == set(range(10))
    assert set(random_classes([4], 1, range(5)).tolist()) == {4}


def test_on_step_sees_x_t_before_each_step():
    seen = []
    solver = Solver("ddim", NoiseSchedule())
    stages = [Stage(Recorder(), [999, 499])]
    sample(stages, solver, SeededNoise([1]), SHAPE, on_step=lambda t, x: seen.append((t, x)))
    assert [t for t, _ in seen] == [999, 499]
    assert torch.equal(seen[0][1], SeededNoise([1])(*SHAPE))


def test_guidance_is_one_call_with_and_without_the_class():
    calls = []

    def denoiser(x_t, t, y):
        calls.append((len(x_t), t, y.tolist()))
        return y.float().view(-1, 1, 1, 1).expand(-1, *SHAPE)

    x, y = torch.zeros(2, *SHAPE), torch.tensor([1, 2])
    got = guided(denoiser, 0.5, no_class=9)(x, 7, y)
    assert calls == [(4, 7, [1, 2, 9, 9])]
    assert got[:, 0, 0, 0].tolist() == [1 + 0.5 * (1 - 9), 2 + 0.5 * (2 - 9)]


@pytest.mark.parametrize("name", SOLVERS)
def test_the_loop_reads_nothing_back_from_the_images(name, monkeypatch):
    """On an accelerator each read would make the host wait. A tensor on meta has no numbers: to read one raises."""
    schedule, timesteps = NoiseSchedule(), spaced_timesteps(1000, 10)
    stages = stages_of([ExactGaussian(schedule)] * 2, timesteps, [501, 0])
    solver = make_solver(name, schedule, "predict_noise", eta=1.0 if name == "ddim" else 0.0)
    # The watch alone asks, at the end and after a hundred steps.
    monkeypatch.setattr(FiniteWatch, "settle", lambda watch: None)
    images = sample(stages, solver, lambda *shape: torch.zeros(2, *shape, device="meta"), SHAPE)
    assert images.shape == (2, *SHAPE)
    with pytest.raises(RuntimeError):
        float(images.sum())


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 64, 64), (3, 256, 256)])
def test_noise_of_a_sample_depends_neither_on_its_neighbours_nor_on_how_it_is_drawn(shape):
    calls = 20
    alone, among = SeededNoise([5]), SeededNoise([3, 5, 9])
    drawn = torch.stack([alone(*shape)[0] for _ in range(calls)])
    assert torch.equal(drawn, torch.stack([among(*shape)[1] for _ in range(calls)]))
    assert drawn.mean().abs() < 5 / drawn.numel() ** 0.5 and (drawn.std() - 1).abs() < 5 / drawn.numel() ** 0.5
    correlations = torch.corrcoef(drawn.flatten(1)) - torch.eye(calls)
    assert correlations.abs().max() < 6 / drawn[0].numel() ** 0.5


class Spoiled(Recorder):
    """A denoiser whose output at some t has one number in it that is not finite."""

    def __init__(self, at: int, value: float):
        super().__init__()
        self.at, self.value = at, value

    def __call__(self, x_t, t, y):
        output = super().__call__(x_t, t, y)
        if t == self.at:
            output[-1, -1, -1, -1] = self.value
        return output


def run(denoiser, solver, timesteps) -> None:
    sample([Stage(denoiser, timesteps)], solver, SeededNoise([0, 1]), SHAPE)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("clip_x0", [False, True])
@pytest.mark.parametrize("parametrization", ["predict_noise", "predict_original"])
@pytest.mark.parametrize("name", SOLVERS)
def test_what_is_not_finite_ends_the_run_with_its_t(name, parametrization, clip_x0, value):
    """At the first, a middle and the last step; clipping would make of an infinite number one that looks well."""
    timesteps = spaced_timesteps(1000, 6)
    for t in (timesteps[0], timesteps[2], timesteps[-1]):
        solver = make_solver(name, NoiseSchedule(), parametrization, clip_x0=clip_x0)
        with pytest.raises(InputError, match=f"not finite from t = {t} on"):
            run(Spoiled(t, value), solver, timesteps)


def test_a_solver_that_leaves_the_finite_ends_the_run():
    class Overflowing(Solver):
        def step(self, model_output, x_t, t, s, draw_noise):
            return x_t * 1e30

    with pytest.raises(InputError, match=r"not finite from t = 99 on"):  # 1e30, 1e60
        run(Recorder(), Overflowing("ddim", NoiseSchedule()), [199, 99, 49])


def test_a_long_run_ends_soon_but_does_not_ask_at_every_step(monkeypatch):
    asked = []
    settle = FiniteWatch.settle
    monkeypatch.setattr(FiniteWatch, "settle", lambda watch: asked.append(1) or settle(watch))
    solver, timesteps = Solver("ddim", NoiseSchedule()), spaced_timesteps(1000, None)
    run(Recorder(), solver, timesteps)
    assert len(asked) <= 11
    spoiled = Spoiled(950, float("nan"))
    with pytest.raises(InputError, match="t = 950 "):
        run(spoiled, solver, timesteps)
    assert len(spoiled.seen) <= 100
