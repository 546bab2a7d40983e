"""The noise schedule and one function per equation.

DDPM is Ho et al. 2020, "Denoising Diffusion Probabilistic Models"; DDIM is Song et al. 2021, "Denoising
Diffusion Implicit Models"; the continuous VP process is Song et al. 2021, "Score-Based Generative Modeling
through Stochastic Differential Equations". Tables are float64; they are cast where they meet the image.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from common.config import PARAMETRIZATIONS, DiffusionConfig, check_choice
from common.errors import InputError


class NoiseSchedule:
    """The tables of the forward process, each (T,) float64 on the CPU.

    The arguments are fields of `DiffusionConfig`, which checks them (InputError).

    betas: variance added at t. alphas: 1 - betas. alphas_cumprod: products of alphas up to t, alpha bar.
    posterior_variance: beta tilde, DDPM Eq. 7; 0 at t = 0.
    """

    def __init__(
        self,
        num_timesteps: int = 1000,
        beta_schedule: str = "linear",
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
    ):
        self.config = DiffusionConfig(
            num_timesteps=num_timesteps,
            beta_schedule=beta_schedule,
            beta_start=beta_start,
            beta_end=beta_end,
        )
        if beta_schedule == "continuous_vp":  # alpha bar of the process at the times 1 / T, 2 / T, ..., 1
            time = torch.arange(1, num_timesteps + 1, dtype=torch.float64) / num_timesteps
            least, rise = self._beta_of_time()
            log_alpha_bar = -(least * time + rise * time**2 / 2)  # minus the integral of beta; Eq. 33
            self.betas = -torch.expm1(log_alpha_bar.diff(prepend=torch.zeros(1, dtype=torch.float64)))
        elif beta_schedule == "cosine":
            time = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
            signal = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
            self.betas = (1 - signal[1:] / signal[:-1]).clamp(max=0.999)
        elif beta_schedule == "rectified_flow":
            time = (torch.arange(num_timesteps, dtype=torch.float64) + 0.5) / num_timesteps
            alpha_bar = (1 - time) ** 2 / ((1 - time) ** 2 + time**2)
            self.betas = 1 - alpha_bar / torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
        elif beta_schedule == "linear":
            self.betas = torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64)
        else:  # scaled_linear: linear in the standard deviation, as in latent diffusion
            std = torch.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=torch.float64)
            self.betas = std**2
        self.alphas = 1 - self.betas
        self.alphas_cumprod = self.alphas.cumprod(0)
        previous = torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod[:-1]])
        self.posterior_variance = self.betas * (1 - previous) / (1 - self.alphas_cumprod)

    @property
    def num_timesteps(self) -> int:
        return len(self.betas)

    def alpha_bar(self, t: int) -> float:
        """alphas_cumprod at t; t = -1 is the clean image, 1."""
        return float(self.alphas_cumprod[t]) if t >= 0 else 1.0

    def timestep_at(self, alpha_bar: float) -> float:
        """The t, between the integers too, at which the process has this alpha bar. Raises InputError outside (0, 1].

        The continuous processes have one everywhere, beyond the table's ends too. Of the others t is linear in log
        alpha bar between the entries of the table, and goes on beyond them along the outermost two, as the samplers
        do that the public weights were published with.
        """
        if not 0 < alpha_bar <= 1:
            raise InputError(f"alpha_bar={alpha_bar} is outside (0, 1]")
        log_alpha_bar = math.log(alpha_bar)
        if self.config.beta_schedule == "continuous_vp":
            least, rise = self._beta_of_time()
            time = -2 * log_alpha_bar / (least + math.sqrt(least**2 - 2 * rise * log_alpha_bar))
            return self.num_timesteps * time - 1
        if self.config.beta_schedule == "rectified_flow":
            noise, signal = math.sqrt(1 - alpha_bar), math.sqrt(alpha_bar)
            return self.num_timesteps * noise / (noise + signal) - 0.5
        if self.num_timesteps == 1:
            return 0.0
        table = torch.log1p(-self.betas).cumsum(0)  # falling
        after = int((table > log_alpha_bar).sum().clamp(1, len(table) - 1))
        before = after - 1
        return before + (log_alpha_bar - float(table[before])) / float(table[after] - table[before])

    def _beta_of_time(self) -> tuple[float, float]:
        """For the continuous process: beta at time 0, and its rise until time 1."""
        config = self.config
        return config.num_timesteps * config.beta_start, config.num_timesteps * (config.beta_end - config.beta_start)

    def log_snr(self, t: int) -> float:
        """log (alpha bar / (1 - alpha bar)): the same at the same noise level, whatever the schedule."""
        return math.log(self.alpha_bar(t)) - math.log1p(-self.alpha_bar(t))

    def q_sample(self, x0: Tensor, t: Tensor | int, eps: Tensor) -> Tensor:
        """Noise clean images: x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps. DDPM, Eq. 4.

        x0, eps: (B, C, H, W). t: (B,) or one int. Returns (B, C, H, W).
        """
        signal = self.at(self.alphas_cumprod.sqrt(), t, x0)
        noise = self.at((1 - self.alphas_cumprod).sqrt(), t, x0)
        return signal * x0 + noise * eps

    def posterior_mean(self, x0: Tensor, x_t: Tensor, t: Tensor | int) -> Tensor:
        """The mean of q(x_{t-1} | x_t, x0). DDPM, Eq. 7. Shapes as in `q_sample`."""
        previous = self.alphas_cumprod / self.alphas
        of_x0 = previous.sqrt() * self.betas / (1 - self.alphas_cumprod)
        of_x_t = self.alphas.sqrt() * (1 - previous) / (1 - self.alphas_cumprod)
        return self.at(of_x0, t, x0) * x0 + self.at(of_x_t, t, x0) * x_t

    @staticmethod
    def at(table: Tensor, t: Tensor | int, image: Tensor) -> Tensor | float:
        """A table's entries at t, ready to be multiplied with the image."""
        if not isinstance(t, Tensor):
            return float(table[t])
        return table.to(image.dtype).to(image.device)[t.to(image.device)].view(-1, 1, 1, 1)


def time_input(diffusion_params: DiffusionConfig, alpha_bar: float) -> float:
    """The time input of a network at an alpha bar in (0, 1] of x_t; continuous between timesteps.

    At the alpha bar of a timestep t it is what the network of `models.loading.build_network` makes of t, before
    `normalize_timesteps` divides it by 1000. Beyond the timesteps see `NoiseSchedule.timestep_at`.
    """
    t = NoiseSchedule(**diffusion_params.schedule).timestep_at(alpha_bar)
    scale, shift = diffusion_params.time_line
    return scale * (t + shift)


def network_input(alpha_bar: Tensor | float, x_t: Tensor, parametrization: str) -> Tensor:
    """The state that a network is shown: x_t, but for `predict_velocity` that of rectified flow at the same ratio of
    signal and noise, (1 - s) x0 + s eps.

    alpha_bar: one number, or (B, 1, 1, 1).
    """
    if parametrization != "predict_velocity":
        return x_t
    return x_t / (alpha_bar**0.5 + (1 - alpha_bar) ** 0.5)


def training_target(
    schedule: NoiseSchedule, x0: Tensor, x_t: Tensor, t: Tensor, eps: Tensor, parametrization: str
) -> Tensor:
    """What the network should predict: (B, C, H, W). t: (B,). See `to_eps` for the parametrizations."""
    check_choice("parametrization", parametrization, PARAMETRIZATIONS)
    if parametrization == "predict_noise":
        return eps
    if parametrization == "predict_original":
        return x0
    if parametrization == "predict_velocity":
        return eps - x0
    if parametrization == "predict_v":
        alpha_bar = schedule.at(schedule.alphas_cumprod, t, x0)
        return alpha_bar**0.5 * eps - (1 - alpha_bar) ** 0.5 * x0
    return schedule.posterior_mean(x0, x_t, t)


def to_x0(schedule: NoiseSchedule, model_output: Tensor, x_t: Tensor, t: int, parametrization: str) -> Tensor:
    """The clean image that a model output implies. DDPM, Eq. 4 solved for x0."""
    check_choice("parametrization", parametrization, PARAMETRIZATIONS)
    if parametrization == "predict_original":
        return model_output
    alpha_bar_t = schedule.alpha_bar(t)
    if parametrization == "predict_v":
        return alpha_bar_t**0.5 * x_t - (1 - alpha_bar_t) ** 0.5 * model_output
    eps = to_eps(schedule, model_output, x_t, t, parametrization)
    return (x_t - (1 - alpha_bar_t) ** 0.5 * eps) / alpha_bar_t**0.5


def to_eps(schedule: NoiseSchedule, model_output: Tensor, x_t: Tensor, t: int, parametrization: str) -> Tensor:
    """The noise that a model output implies, x_t being that of the variance-preserving process.

    predict_noise: eps itself. predict_original: x0; DDPM, Eq. 4 solved for eps. predict_previous: the mean of x_{t-1};
    DDPM, Eq. 11. predict_v: sqrt(alpha bar) eps - sqrt(1 - alpha bar) x0; Salimans and Ho 2022, Appendix D.
    predict_velocity: eps - x0, the velocity of rectified flow (Liu et al. 2023), see also `network_input`.
    """
    check_choice("parametrization", parametrization, PARAMETRIZATIONS)
    if parametrization == "predict_noise":
        return model_output
    alpha_bar_t = schedule.alpha_bar(t)
    signal, noise = alpha_bar_t**0.5, (1 - alpha_bar_t) ** 0.5
    if parametrization == "predict_original":
        return (x_t - signal * model_output) / noise
    if parametrization == "predict_v":
        return noise * x_t + signal * model_output
    if parametrization == "predict_velocity":  # x_t = signal x0 + noise eps, and x0 = eps - velocity
        return (x_t + signal * model_output) / (signal + noise)
    alpha_t, beta_t = float(schedule.alphas[t]), float(schedule.betas[t])
    return (x_t - alpha_t**0.5 * model_output) * (noise / beta_t)


def to_posterior_mean(
    schedule: NoiseSchedule, model_output: Tensor, x_t: Tensor, t: int, parametrization: str
) -> Tensor:
    """The mean of x_{t-1} that a model output implies. DDPM, Eq. 7 and Eq. 11."""
    check_choice("parametrization", parametrization, PARAMETRIZATIONS)
    if parametrization == "predict_previous":
        return model_output
    if parametrization == "predict_original":
        return schedule.posterior_mean(model_output, x_t, t)
    if parametrization != "predict_noise":
        model_output = to_eps(schedule, model_output, x_t, t, parametrization)
    alpha_t, beta_t = float(schedule.alphas[t]), float(schedule.betas[t])
    return (x_t - beta_t / (1 - schedule.alpha_bar(t)) ** 0.5 * model_output) / alpha_t**0.5


def ddpm_step(
    schedule: NoiseSchedule,
    model_output: Tensor,
    x_t: Tensor,
    t: int,
    noise: Tensor | None,
    parametrization: str = "predict_noise",
) -> Tensor:
    """Draw x_{t-1} given x_t. DDPM, Algorithm 2 with the posterior variance beta tilde.

    model_output, x_t, noise: (B, C, H, W). noise is not used at t = 0, where the mean is the image.
    parametrization: what model_output is. Nothing is clipped.
    """
    mean = to_posterior_mean(schedule, model_output, x_t, t, parametrization)
    return mean if t == 0 else mean + float(schedule.posterior_variance[t]) ** 0.5 * noise


def ddim_step(
    x_t: Tensor, eps: Tensor, alpha_bar_t: float, alpha_bar_s: float, eta: float, noise: Tensor | None
) -> Tensor:
    """Move x_t to x_s, s < t. DDIM, Eq. 12 with sigma from Eq. 16.

    x_t, eps, noise: (B, C, H, W). alpha_bar_t, alpha_bar_s: in (0, 1]; alpha_bar_s = 1 lands on x0.
    eta: 0 is deterministic (noise may be None), 1 has the variance of DDPM.
    """
    x0 = (x_t - (1 - alpha_bar_t) ** 0.5 * eps) / alpha_bar_t**0.5
    var = eta**2 * (1 - alpha_bar_s) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_s)
    mean = alpha_bar_s**0.5 * x0 + max(1 - alpha_bar_s - var, 0.0) ** 0.5 * eps
    return mean + var**0.5 * noise if var > 0 else mean
