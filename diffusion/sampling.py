"""The sampling loop, the choice of the network by timestep, and noise that belongs to a sample.

A denoiser is any callable (x_t, t, y) -> model output, with x_t and the output (B, C, H, W), t an int
and y (B,) classes or None. One network, several that take turns, and an early-exit network are
denoisers alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from common.errors import InputError
from diffusion.solvers import Solver

Denoiser = Callable[[Tensor, int, Tensor | None], Tensor]


def turn_at(t: int, switches: Sequence[int]) -> int:
    """Whose turn it is at t, 0 for the first: the one place where this is decided. See `SwitchingDenoiser`."""
    return sum(t <= switch for switch in switches)


def timesteps_of_turns(timesteps: Sequence[int], switches: Sequence[int]) -> list[list[int]]:
    """Which of the timesteps each turn has."""
    return [[t for t in timesteps if turn_at(t, switches) == k] for k in range(len(switches) + 1)]


class SwitchingDenoiser:
    """Several denoisers that take turns as t falls; DuoDiff is the case of two. One may come more than once.

    switches: one timestep between each two neighbours, falling. The first denoiser runs at every
    t > switches[0], the second at the t down to switches[1], ..., the last at every t <= switches[-1].
    on_switch: called with the number of a denoiser before it runs where another did, and at the very first.
    """

    def __init__(
        self,
        denoisers: Sequence[Denoiser],
        switches: Sequence[int] = (),
        on_switch: Callable[[int], None] | None = None,
    ):
        if len(switches) != len(denoisers) - 1:
            raise InputError(f"{len(denoisers)} networks need {len(denoisers) - 1} switches, not {len(switches)}")
        if list(switches) != sorted(switches, reverse=True):
            raise InputError(f"switches {', '.join(map(str, switches))} must not rise")
        self.denoisers, self.switches, self.on_switch = list(denoisers), list(switches), on_switch
        self.active: int | None = None

    def index(self, t: int) -> int:
        """Which denoiser runs at t."""
        return turn_at(t, self.switches)

    def timesteps_of_each(self, timesteps: Sequence[int]) -> list[list[int]]:
        """Which of the timesteps each denoiser runs."""
        return timesteps_of_turns(timesteps, self.switches)

    def steps_of_each(self, timesteps: Sequence[int]) -> list[int]:
        """How many of the timesteps each denoiser runs."""
        return [len(own) for own in self.timesteps_of_each(timesteps)]

    def __call__(self, x_t: Tensor, t: int, y: Tensor | None) -> Tensor:
        if (chosen := self.index(t)) != self.active:
            self.active = chosen
            if self.on_switch is not None:
                self.on_switch(chosen)
        return self.denoisers[chosen](x_t, t, y)


def guided(denoiser: Denoiser, scale: float, no_class: int) -> Denoiser:
    """Classifier-free guidance (Ho and Salimans 2022): cond + scale (cond - uncond), both in one call.

    scale: 0 is no guidance. no_class: the class that stands for none.
    """

    def both(x_t: Tensor, t: int, y: Tensor) -> Tensor:
        classes = torch.cat([y, torch.full_like(y, no_class)])
        cond, uncond = denoiser(torch.cat([x_t, x_t]), t, classes).chunk(2)
        return cond + scale * (cond - uncond)

    return both


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
    return torch.tensor([choices[pick] for pick in picks])


class FiniteWatch:
    """Ends a run whose numbers are not finite any more. Such a number stays, and would become a black pixel.

    To know at once the host would have to wait for the accelerator at each step. It asks after many of them instead,
    and at the end, when the images are wanted anyway: `settle` must be called then.
    """

    EVERY = 100  # calls

    def __init__(self) -> None:
        self.marks: list[tuple[int, Tensor]] = []  # t, and on the device 0 where all was finite, else NaN

    def __call__(self, t: int, values: Tensor) -> None:
        """values: of any shape, met at t."""
        self.marks.append((t, (values * 0).sum()))
        if len(self.marks) == self.EVERY:
            self.settle()

    def settle(self) -> None:
        """Raises InputError, which names the first t, if something was not finite since the last time."""
        spoiled = torch.stack([mark for _, mark in self.marks]).isnan().tolist() if self.marks else []
        if True in spoiled:
            raise InputError(
                f"not finite from t = {self.marks[spoiled.index(True)][0]} on; try --precision fp32, or a --solver "
                "and --steps that are known to do"
            )
        self.marks.clear()


@torch.inference_mode()
def sample(
    denoiser: Denoiser,
    solver: Solver,
    timesteps: Sequence[int],
    noise: Callable[..., Tensor],
    image_shape: tuple[int, int, int],
    y: Tensor | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
    watch: FiniteWatch | None = None,
) -> Tensor:
    """Generate images: (B, C, H, W), nominally in [-1, 1], not clipped.

    timesteps: falling; the last one leads to the clean image. noise: called with image_shape (C, H, W),
    gives (B, C, H, W); it makes the start and what the solver draws. on_step: called before each step
    with t and x_t. watch: sees what each step makes; the caller settles it.
    """
    which = denoiser.index if isinstance(denoiser, SwitchingDenoiser) else lambda t: 0
    solver.begin(timesteps)
    x_t, network = noise(*image_shape), which(timesteps[0])
    for t, s in zip(timesteps, [*timesteps[1:], -1], strict=True):
        if on_step is not None:
            on_step(t, x_t)
        if (chosen := which(t)) != network:
            network = chosen
            solver.forget()
        output = denoiser(x_t, t, y)
        x_t = solver.step(output, x_t, t, s, lambda: noise(*image_shape))
        if watch is not None:
            watch(t, output if solver.clip_x0 else x_t)  # clipping makes of an infinite number one that looks well
    return x_t
