"""Paths of noisy images through the timesteps of a sampler, from the noisiest to the cleanest, to measure networks on.

A network that is asked at one timestep alone needs the marginal distribution there. A plan that remembers earlier steps
needs the joint distribution, that of the paths of the full network's sampler.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from diffusion.ddpm import ddim_step
from diffusion.solvers import Solver


class Path(Protocol):
    """x_t at falling t, (B, C, H, W)."""

    def start(self, t: int, draw_noise: Callable[[], Tensor]) -> Tensor:
        """x_t at the first, noisiest t."""

    def onward(self, output: Tensor, x_t: Tensor, t: int, s: int, draw_noise: Callable[[], Tensor]) -> Tensor:
        """x_s from x_t, s < t. output: of the full network at x_t."""

    def noise_in(self, x_t: Tensor, t: int) -> Tensor | None:
        """The noise that was added to a clean image to make x_t; None if there was no clean image."""


class DataPath:
    """From real images x0 by the forward process, read backward: x_s is drawn from q(x_s | x_t, x0).

    For a solver with DDPM's noise that is the Markov chain of forward noising, jumping between the sampler's own
    timesteps (Ho et al. 2020, Eq. 7); for one with other or no noise it is DDIM's process of the same eta, with the
    same marginals (Song et al. 2021, Eq. 7). If the network were perfect, these would be the paths of its sampler.
    """

    def __init__(self, solver: Solver, x0: Tensor):
        self.schedule, self.eta, self.x0 = solver.schedule, solver.noise_level, x0

    def start(self, t: int, draw_noise: Callable[[], Tensor]) -> Tensor:
        return self.schedule.q_sample(self.x0, t, draw_noise())

    def onward(self, output: Tensor, x_t: Tensor, t: int, s: int, draw_noise: Callable[[], Tensor]) -> Tensor:
        noise = draw_noise() if self.eta > 0 else None
        alpha_bars = self.schedule.alpha_bar(t), self.schedule.alpha_bar(s)
        return ddim_step(x_t, self.noise_in(x_t, t), *alpha_bars, self.eta, noise)

    def noise_in(self, x_t: Tensor, t: int) -> Tensor:
        alpha_bar = self.schedule.alpha_bar(t)
        return (x_t - alpha_bar**0.5 * self.x0) / (1 - alpha_bar) ** 0.5


class SampledPath:
    """The path on which the full network itself samples."""

    def __init__(self, solver: Solver):
        self.solver = solver

    def start(self, t: int, draw_noise: Callable[[], Tensor]) -> Tensor:
        return draw_noise()

    def onward(self, output: Tensor, x_t: Tensor, t: int, s: int, draw_noise: Callable[[], Tensor]) -> Tensor:
        return self.solver.step(output, x_t, t, s, draw_noise)

    def noise_in(self, x_t: Tensor, t: int) -> None:
        return None
