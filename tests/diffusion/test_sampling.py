from __future__ import annotations

import itertools

import pytest
import torch

from common.errors import InputError
from common.seeds import nth_seed
from diffusion import NoiseSchedule
from diffusion.sampling import FiniteWatch, SeededNoise, SwitchingDenoiser, guided, random_classes, sample
from diffusion.solvers import Solver, make_solver, spaced_timesteps

SHAPE = (1, 2, 2)


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
    denoiser = SwitchingDenoiser([shallow, full], [t_switch])
    timesteps = spaced_timesteps(1000, None)
    sample(denoiser, Solver("ddpm", NoiseSchedule()), timesteps, SeededNoise([0]), SHAPE)
    assert shallow.seen == [t for t in range(999, -1, -1) if t > t_switch]
    assert full.seen == [t for t in range(999, -1, -1) if t <= t_switch]
    assert denoiser.steps_of_each(timesteps) == [1000 - full_runs, full_runs]


def test_the_switch_is_a_timestep_also_with_few_steps():
    shallow, full = Recorder(), Recorder()
    denoiser = SwitchingDenoiser([shallow, full], [499])
    sample(denoiser, Solver("ddim", NoiseSchedule()), spaced_timesteps(1000, 4), SeededNoise([0]), SHAPE)
    assert (shallow.seen, full.seen) == ([999, 749], [499, 249])


def test_three_networks_take_turns():
    networks = [Recorder() for _ in range(3)]
    denoiser = SwitchingDenoiser(networks, [600, 200])
    sample(denoiser, Solver("ddim", NoiseSchedule()), spaced_timesteps(1000, None), SeededNoise([0]), SHAPE)
    assert [(n.seen[0], n.seen[-1]) for n in networks] == [(999, 601), (600, 201), (200, 0)]


def test_switches_that_make_no_sense_are_refused():
    for switches in ([], [1, 2], [3]):
        with pytest.raises(InputError):
            SwitchingDenoiser([Recorder()] * 3, switches)


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


@pytest.mark.parametrize(
    "name, eta, steps, std",
    [
        *(("ddpm", 0, 20, 0.392), ("ddpm", 0, 50, 0.444), ("ddpm", 0, 1000, 0.496)),
        *(("ddim", 0, 20, 0.431), ("ddim", 0, 50, 0.471), ("ddim", 0, 1000, 0.499)),
        *(("ddim", 1, 20, 0.392), ("ddim", 1, 50, 0.444), ("ddim", 1, 1000, 0.496)),
    ],
)
def test_exact_denoiser_gives_the_distribution_of_the_data(name, eta, steps, std):
    """The standard deviations short of 0.5 are the solvers' own: the same linear map, worked out by hand."""
    schedule = NoiseSchedule()
    solver = Solver(name, schedule, eta=eta)
    noise = SeededNoise([7])
    x = sample(ExactGaussian(schedule), solver, spaced_timesteps(1000, steps), noise, (1, 200, 200))
    assert x.mean().item() == pytest.approx(0.3, abs=0.01)
    assert x.std().item() == pytest.approx(std, abs=0.006)


@pytest.mark.parametrize("parametrization", ["predict_noise", "predict_original"])
@pytest.mark.parametrize(
    "name, steps, std",
    [("dpmsolver++", 20, 0.477), ("dpmsolver++", 50, 0.500), ("unipc", 20, 0.479), ("unipc", 50, 0.498)],
)
@pytest.mark.parametrize("switch", [None, 500])
def test_multistep_solvers_with_the_exact_denoiser(name, steps, std, parametrization, switch):
    """They come nearer to 0.5 than DDIM does with as many steps (0.431 and 0.471), with a switch as without."""
    schedule = NoiseSchedule()
    denoiser = ExactGaussian(schedule, parametrization)
    if switch is not None:
        denoiser = SwitchingDenoiser([denoiser, ExactGaussian(schedule, parametrization)], [switch])
    solver = make_solver(name, schedule, parametrization)
    for _ in range(2):  # nothing of one batch is left in the next
        x = sample(denoiser, solver, spaced_timesteps(1000, steps), SeededNoise([7]), (1, 200, 200))
        assert x.mean().item() == pytest.approx(0.3, abs=0.01)
        assert x.std().item() == pytest.approx(std, abs=0.004)


@pytest.mark.parametrize("name", ["dpmsolver++", "unipc"])
def test_the_first_step_after_a_switch_is_of_first_order(name):
    """A first-order step in predictions of x0 is DDIM's, and knows nothing of what the network before said."""
    schedule, timesteps = NoiseSchedule(), [999, 749, 499, 249]
    outputs = torch.randn(4, 1, *SHAPE)
    steps = iter(outputs)
    states = []
    networks = [lambda x, t, y: next(steps)] * 2
    sample(
        SwitchingDenoiser(networks, [499]), make_solver(name, schedule, "predict_original"), timesteps,
        SeededNoise([1]), SHAPE, on_step=lambda t, x: states.append(x),
    )  # fmt: skip
    want = Solver("ddim", schedule, "predict_original").step(outputs[2], states[2], 499, 249, lambda: None)
    torch.testing.assert_close(states[3], want, rtol=1e-4, atol=1e-5)
    other = Solver("ddim", schedule, "predict_original").step(outputs[1], states[1], 749, 499, lambda: None)
    assert not torch.allclose(states[2], other, atol=1e-3), "the second step should have been of second order"


def test_solvers_that_skip_timesteps_need_a_parametrization_that_can():
    with pytest.raises(InputError, match="predict_previous"):
        make_solver("unipc", NoiseSchedule(), "predict_previous")


def test_clip_x0_holds_the_image_in_range():
    schedule = NoiseSchedule()
    wild = lambda x_t, t, y: torch.full_like(x_t, 3.0)  # noqa: E731
    for name in ("ddpm", "ddim"):
        timesteps = spaced_timesteps(1000, 10)
        free, held = (
            sample(wild, Solver(name, schedule, "predict_original", clip_x0=clip), timesteps, SeededNoise([0]), SHAPE)
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
    sample(Recorder(), solver, [999, 499], SeededNoise([1]), SHAPE, on_step=lambda t, x: seen.append((t, x)))
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


def test_the_first_network_and_every_change_are_told():
    told = []
    networks = [Recorder() for _ in range(3)]
    denoiser = SwitchingDenoiser(networks, [600, 200], on_switch=told.append)
    for _ in range(2):
        sample(denoiser, Solver("ddim", NoiseSchedule()), spaced_timesteps(1000, 10), SeededNoise([0]), SHAPE)
    assert told == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpmsolver++", "unipc"])
def test_the_loop_reads_nothing_back_from_the_images(name):
    """On an accelerator each read would make the host wait. A tensor on meta has no numbers: to read one raises."""
    schedule, timesteps = NoiseSchedule(), spaced_timesteps(1000, 10)
    denoiser = SwitchingDenoiser([ExactGaussian(schedule)] * 2, [500])
    solver = make_solver(name, schedule, "predict_noise", eta=1.0 if name == "ddim" else 0.0)
    images = sample(
        denoiser, solver, timesteps, lambda *shape: torch.zeros(2, *shape, device="meta"), SHAPE, watch=FiniteWatch()
    )
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


def watched(denoiser, solver, timesteps) -> None:
    watch = FiniteWatch()
    sample(denoiser, solver, timesteps, SeededNoise([0, 1]), SHAPE, watch=watch)
    watch.settle()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("clip_x0", [False, True])
@pytest.mark.parametrize("parametrization", ["predict_noise", "predict_original"])
@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpmsolver++", "unipc"])
def test_what_is_not_finite_ends_the_run_with_its_t(name, parametrization, clip_x0, value):
    """At the first, a middle and the last step; clipping would make of an infinite number one that looks well."""
    timesteps = spaced_timesteps(1000, 6)
    for t in (timesteps[0], timesteps[2], timesteps[-1]):
        solver = make_solver(name, NoiseSchedule(), parametrization, clip_x0=clip_x0)
        with pytest.raises(InputError, match=f"not finite from t = {t} on"):
            watched(Spoiled(t, value), solver, timesteps)


def test_a_solver_that_leaves_the_finite_ends_the_run():
    class Overflowing(Solver):
        def step(self, model_output, x_t, t, s, draw_noise):
            return x_t * 1e30

    with pytest.raises(InputError, match=r"not finite from t = 99 on"):  # 1e30, 1e60
        watched(Recorder(), Overflowing("ddim", NoiseSchedule()), [199, 99, 49])


def test_a_long_run_ends_soon_but_does_not_ask_at_every_step(monkeypatch):
    asked = []
    settle = FiniteWatch.settle
    monkeypatch.setattr(FiniteWatch, "settle", lambda watch: asked.append(1) or settle(watch))
    solver, timesteps = Solver("ddim", NoiseSchedule()), spaced_timesteps(1000, None)
    watched(Recorder(), solver, timesteps)
    assert len(asked) <= 11
    spoiled = Spoiled(950, float("nan"))
    with pytest.raises(InputError, match="t = 950 "):
        watched(spoiled, solver, timesteps)
    assert len(spoiled.seen) <= 100
