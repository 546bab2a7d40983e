"""Solvers: how a model output moves x_t to the next, less noisy timestep."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.config import check_choice
from common.errors import InputError
from common.solvers import SOLVERS
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


def make_solver(
    name: str, schedule: NoiseSchedule, parametrization: str, eta: float = 0.0, clip_x0: bool = False
) -> Solver:
    """name: one of SOLVERS; eta belongs to ddim. Raises InputError for a combination that makes no sense."""
    check_choice("solver", name, tuple(SOLVERS))
    entry = SOLVERS[name]
    maker = getattr(importlib.import_module(entry.module), entry.maker)
    solver: Solver = maker(name, schedule, parametrization, eta, clip_x0)
    return solver


@dataclass
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

    @property
    def noise_level(self) -> float:
        """Eta of DDIM's family of processes: 0 for a deterministic solver, 1 for the noise of DDPM."""
        return 1.0 if self.name == "ddpm" else self.eta

    def begin(self, timesteps: Sequence[int]) -> None:
        """Called before each batch with the timesteps that are to come."""

    def forget(self) -> None:
        """Called where another network takes over: its outputs do not continue those of the one before."""

    def step(self, model_output: Tensor, x_t: Tensor, t: int, s: int, draw_noise: Callable[[], Tensor]) -> Tensor:
        """x_s from x_t, both (B, C, H, W). s < t; s = -1 is the clean image.

        draw_noise: called once if the step is random, otherwise not at all.
        """
        model_output, parametrization = self._clipped(model_output, x_t, t)
        if self.name == "ddpm" and s == t - 1:
            noise = draw_noise() if t > 0 else None
            return ddpm_step(self.schedule, model_output, x_t, t, noise, parametrization)
        eta = self.noise_level
        eps = to_eps(self.schedule, model_output, x_t, t, parametrization)
        noise = draw_noise() if eta > 0 and s >= 0 else None
        return ddim_step(x_t, eps, self.schedule.alpha_bar(t), self.schedule.alpha_bar(s), eta, noise)

    def eps(self, model_output: Tensor, x_t: Tensor, t: int) -> Tensor:
        """The noise in x_t according to the model output, (B, C, H, W)."""
        model_output, parametrization = self._clipped(model_output, x_t, t)
        return to_eps(self.schedule, model_output, x_t, t, parametrization)

    def _clipped(self, model_output: Tensor, x_t: Tensor, t: int) -> tuple[Tensor, str]:
        """The model output after clipping, and its parametrization."""
        if not self.clip_x0:
            return model_output, self.parametrization
        return to_x0(self.schedule, model_output, x_t, t, self.parametrization).clamp(-1, 1), "predict_original"


@dataclass
class MultistepSolver(Solver):
    """DPM-Solver++(2M) (Lu et al. 2022) and UniPC (Zhao et al. 2023) of diffusers, on this project's schedule.

    Both work on predictions of the clean image and remember the one before, so they take a first-order step
    at the beginning, at the end, and wherever another network takes over.
    """

    def __post_init__(self) -> None:
        if self.parametrization == "predict_previous":
            raise InputError(
                f"--solver {self.name} skips timesteps, but predict_previous gives only the next one; use ddpm or ddim"
            )
        # Slow to import. By their own modules: what diffusers itself names may be placeholders, which have no methods.
        from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
        from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

        cls = DPMSolverMultistepScheduler if self.name == "dpmsolver++" else UniPCMultistepScheduler
        self.scheduler = cls(
            trained_betas=self.schedule.betas.tolist(), prediction_type="sample", solver_order=2, lower_order_final=True
        )

    def begin(self, timesteps: Sequence[int]) -> None:
        self.scheduler.set_timesteps(len(timesteps))  # also forgets the batch before
        # Ours instead of its own: every list of timesteps is possible, and the last leads to the clean image.
        alpha_bars = self.schedule.alphas_cumprod[list(timesteps)]
        sigmas = ((1 - alpha_bars) / alpha_bars).sqrt().float()
        self.scheduler.timesteps = torch.tensor(timesteps)
        self.scheduler.sigmas = torch.cat([sigmas, torch.zeros(1)])
        self.scheduler.set_begin_index(0)

    def forget(self) -> None:
        self.scheduler.lower_order_nums = 0
        self.scheduler.last_sample = None  # of UniPC's corrector

    def step(self, model_output: Tensor, x_t: Tensor, t: int, s: int, draw_noise: Callable[[], Tensor]) -> Tensor:
        x0 = to_x0(self.schedule, model_output, x_t, t, self.parametrization)
        x0 = x0.clamp(-1, 1) if self.clip_x0 else x0
        return self.scheduler.step(x0, t, x_t, return_dict=False)[0]
