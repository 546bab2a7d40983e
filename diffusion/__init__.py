"""The mathematics of diffusion: the noise schedule, the solvers, the sampling loop."""

from diffusion.ddpm import NoiseSchedule, ddim_step, ddpm_step, time_input

__all__ = ["NoiseSchedule", "ddim_step", "ddpm_step", "time_input"]
