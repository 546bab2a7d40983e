"""The sampling loop over stages, and noise that belongs to a sample.

A denoiser is any callable (x_t, t, y) -> model output, with x_t and the output (B, C, H, W), t an int and y (B,)
classes or None. One network, a network with a memory of the step before and an early-exit network are denoisers alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.errors import InputError
from diffusion.solvers import Solver

Denoiser = Callable[[Tensor, int, Tensor | None], Tensor]


@dataclass(frozen=True)
class Stage:
    """A denoiser and the timesteps at which it runs.

    timesteps: falling. session: makes the context in which the stage runs, such as one that keeps its network on the
    device.
    """

    denoiser: Denoiser
    timesteps: Sequence[int]
    session: Callable[[], AbstractContextManager[object]] = nullcontext


def split_timesteps(timesteps: Sequence[int], lowest: Sequence[int]) -> list[list[int]]:
    """The timesteps of each stage: the one place where it is decided which network runs at t.

    timesteps: falling. lowest: of each stage the lowest t at which it runs, falling; a stage runs at every t down to
    there that no earlier stage has. DuoDiff has two stages, with t_switch + 1 and 0.
    """
    highest = [math.inf, *(t - 1 for t in lowest[:-1])]
    return [[t for t in timesteps if least <= t <= most] for least, most in zip(lowest, highest, strict=True)]


def guided(denoiser: Denoiser, scale: float, no_class: int, guides: Callable[[int], bool] = lambda t: True) -> Denoiser:
    """Classifier-free guidance (Ho and Salimans 2022): cond + scale (cond - uncond), both in one call.

    scale: 0 is no guidance. no_class: the index of "no class". guides: whether there is guidance at t; where
    there is none, cond alone is called for (Kynkaanniemi et al. 2024, arXiv 2404.07724).
    """

    def both(x_t: Tensor, t: int, y: Tensor | None) -> Tensor:
        if not guides(t):
            return denoiser(x_t, t, y)
        assert y is not None, "guidance without classes"
        classes = torch.cat([y, torch.full_like(y, no_class)])
        cond, uncond = denoiser(torch.cat([x_t, x_t]), t, classes).chunk(2)
        return cond + scale * (cond - uncond)

    return both


class NotFinite(InputError):
    """Sampling produced numbers that are not finite."""


class FiniteWatch:
    """Finds the first t with numbers that are not finite. Such a number would end as a black pixel.

    A check at each step would make the host wait for the accelerator, so it checks many steps at once.
    """

    EVERY = 100  # calls

    def __init__(self) -> None:
        self.marks: list[tuple[int, Tensor]] = []  # t, and on the device 0 where all was finite, else NaN

    def __call__(self, t: int, values: Tensor) -> None:
        """values: of any shape, met at t. Raises what `settle` does."""
        self.marks.append((t, (values * 0).sum()))
        if len(self.marks) == self.EVERY:
            self.settle()

    def settle(self) -> None:
        """Raises NotFinite, which names the first t, if something was not finite since the last time."""
        spoiled = torch.stack([mark for _, mark in self.marks]).isnan().tolist() if self.marks else []
        if True in spoiled:
            raise NotFinite(
                f"not finite from t = {self.marks[spoiled.index(True)][0]} on; try --precision fp32, or another "
                "--solver or --steps"
            )
        self.marks.clear()


class SeededNoise:
    """Standard normal noise; row i depends on seeds[i] alone, whatever batch it sits in.

    Each generator draws for several calls at once: on an accelerator a draw per image and step would take as
    long as a small network.
    """

    MOST_CALLS, MOST_NUMBERS = 16, 2**18  # in one draw; they decide the noise, as the batch size must not

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu"):
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self._drawn: list[Tensor] = []  # for the calls to come, (B, C, H, W) each

    def __call__(self, *shape: int) -> Tensor:
        """shape: (C, H, W), the same at every call. Returns (B, C, H, W)."""
        if not self._drawn:
            calls = max(1, min(self.MOST_CALLS, self.MOST_NUMBERS // math.prod(shape)))
            draws = [torch.randn(calls, *shape, generator=g, device=g.device) for g in self.generators]
            self._drawn = list(torch.stack(draws, dim=1).flip(0))
        return self._drawn.pop()


def random_classes(choices: Sequence[int], seed: int, indices: Sequence[int]) -> Tensor:
    """A class for each sample, uniform over the choices; it depends on the seed and the index alone. (B,)."""
    picks = [np.random.default_rng([seed, index]).integers(len(choices)) for index in indices]
    return torch.tensor([choices[int(pick)] for pick in picks])


@torch.inference_mode()
def sample(
    stages: Sequence[Stage],
    solver: Solver,
    noise: Callable[..., Tensor],
    image_shape: tuple[int, int, int],
    y: Tensor | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Generate images: (B, C, H, W), nominally in [-1, 1], not clipped.

    stages: from the noisiest timesteps to the cleanest; the last timestep leads to the clean image. noise: called
    with image_shape (C, H, W), gives (B, C, H, W); it makes the start and all that the solver draws. y: (B,) classes.
    on_step: called before each step with t and x_t. Raises NotFinite where the numbers do not stay finite.
    """
    watch = FiniteWatch()
    timesteps = [t for stage in stages for t in stage.timesteps]
    targets = iter([*timesteps[1:], -1])
    solver.begin(timesteps)
    x_t = noise(*image_shape)
    for stage in stages:
        solver.forget()  # another network's outputs do not continue this one's
        with stage.session():
            for t, s in zip(stage.timesteps, targets):  # noqa: B905, the targets go on in the next stage
                if on_step is not None:
                    on_step(t, x_t)
                output = stage.denoiser(x_t, t, y)
                x_t = solver.step(output, x_t, t, s, lambda: noise(*image_shape))
                watch(t, output if solver.clip_x0 else x_t)  # clipping hides an infinite number
    watch.settle()
    return x_t
