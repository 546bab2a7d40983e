"""The divergence of two samplers with different networks: the weight of a difference in eps at each step.

A step of every solver here moves x_t to x_s = a x_t + c eps + std z, linear in the noise eps that the network
predicts. The factors are taken from the solver itself, so that they hold for any of them.

- Where a step is random, the two samplers draw x_s from Gaussians of one variance, and their Kullback-Leibler
  divergence is c^2 |eps - eps'|^2 / (2 std^2) nats. Summed over the steps it is the divergence of the two paths (chain
  rule), which bounds that of the images. With every timestep of DDPM the factor is beta_t^2 / (2 var_t alpha_t
  (1 - alpha_bar_t)), that of the variational bound: Ho et al. 2020, Eq. 8 and 12.
- Where it is not, they move to different places: by c^2 |eps - eps'|^2 at this step alone, the squared shift.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from diffusion.solvers import Solver


class StepWeights(NamedTuple):
    """The weights of each step, (S,) float64."""

    shift: NDArray[np.float64]  # c: how far x_s moves with eps
    std: NDArray[np.float64]  # standard deviation of the added noise; 0 for a deterministic step

    @property
    def random(self) -> NDArray[np.bool_]:
        """(S,) bool. The last step of a random solver adds no noise, so it is not random."""
        return self.std > 0

    @property
    def divergence(self) -> NDArray[np.float64]:
        """Per squared distance of eps: nats where a step is random, the squared shift where it is not."""
        return np.where(self.random, self.kl, self.shift**2)

    @property
    def kl(self) -> NDArray[np.float64]:
        """Nats per squared distance of eps; infinite where a step is deterministic."""
        with np.errstate(divide="ignore"):
            return self.shift**2 / (2 * self.std**2)


def step_weights(solver: Solver, timesteps: Sequence[int]) -> StepWeights:
    """What the solver's steps through these timesteps, down to the clean image, do with eps and with noise.

    Of solvers that remember predictions it is the step's own use of eps; the part that later steps make of it is
    left out, and so is the first-order step at a switch.
    """
    solver = dataclasses.replace(solver, parametrization="predict_noise", clip_x0=False)
    zero, one = (torch.full((1, 1, 1, 1), value, dtype=torch.float64) for value in (0, 1))
    factors = []
    solver.begin(timesteps)
    for t, s in zip(timesteps, [*timesteps[1:], -1], strict=True):
        of_eps, of_noise = (
            float(copy.deepcopy(solver).step(eps, zero, t, s, noise.clone)) for eps, noise in ((one, zero), (zero, one))
        )
        factors.append((of_eps, of_noise))
        solver.step(zero, zero, t, s, lambda: zero)  # now in the midst of the run, with a memory of zeros
    return StepWeights(*np.array(factors).T)
