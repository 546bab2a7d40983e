"""Solvers: how a model output moves x_t to the next, less noisy timestep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from common.errors import InputError
from diffusion.ddpm import NoiseSchedule, ddim_step, ddpm_step, to_eps, to_x0


def spaced_timesteps(num_timesteps: int, steps: int | None) -> list[int]:
    """`steps` timesteps, evenly spaced, from T - 1 down; all of them for None.

    The first is always T - 1, where sampling begins with pure noise.
    Raises InputError for steps outside 1..T.
    """
    steps = num_timesteps if steps is None else steps
    if not 1 <= steps <= num_timesteps:
        raise InputError(f"--steps {steps} is out of range, wanted 1..{num_timesteps} (all timesteps)")
    return [round(num_timesteps * k / steps) - 1 for k in range(steps, 0, -1)]


@dataclass(frozen=True)
class Solver:
    """DDPM's ancestral sampling, or DDIM with any eta.

    DDPM over skipped timesteps draws from the posterior between the two that are left, which is DDIM
    with eta = 1.

    parametrization: what the model outputs are. clip_x0: hold the clean image that each output stands for
    to [-1, 1].
    """

    name: str
    schedule: NoiseSchedule
    parametrization: str = "predict_noise"
    eta: float = 0.0
    clip_x0: bool = False

    def step(self, model_output: Tensor, x_t: Tensor, t: int, s: int, draw_noise: Callable[[], Tensor]) -> Tensor:
        """x_s from x_t, both (B, C, H, W). s < t; s = -1 is the clean image.

        draw_noise: called once if the step is random, otherwise not at all.
        """
        parametrization = self.parametrization
        if self.clip_x0:
            model_output = to_x0(self.schedule, model_output, x_t, t, parametrization).clamp(-1, 1)
            parametrization = "predict_original"
        if self.name == "ddpm" and s == t - 1:
            noise = draw_noise() if t > 0 else None
            return ddpm_step(self.schedule, model_output, x_t, t, noise, parametrization)
        eta = 1.0 if self.name == "ddpm" else self.eta
        eps = to_eps(self.schedule, model_output, x_t, t, parametrization)
        noise = draw_noise() if eta > 0 and s >= 0 else None
        return ddim_step(x_t, eps, self.schedule.alpha_bar(t), self.schedule.alpha_bar(s), eta, noise)
