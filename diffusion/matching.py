"""Networks with different noise schedules and outputs in one run: each is called at the same noise level.

A stage is matched by its noise level, not by t. Where the sampler's variance-preserving process has some alpha bar, a
network is told the time at which its own process has that, see `own_timesteps`, and its output is read as eps, see
`predicting_noise`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from common.config import DiffusionConfig
from diffusion.ddpm import NoiseSchedule, network_input, to_eps
from diffusion.sampling import Denoiser


def own_timesteps(own: DiffusionConfig, schedule: NoiseSchedule, timesteps: Sequence[int]) -> dict[int, float]:
    """For each timestep of the sampler, the network's own with the same alpha bar, also between the integers."""
    if own.schedule == schedule.config.schedule:
        return {t: t for t in timesteps}
    process = NoiseSchedule(**own.schedule)
    return {t: process.timestep_at(schedule.alpha_bar(t)) for t in timesteps}


def predicting_noise(
    denoiser: Denoiser, schedule: NoiseSchedule, parametrization: str, toward_data: bool = False
) -> Denoiser:
    """The denoiser with eps for its output.

    schedule: the sampler's, whose x_t the denoiser is called with. parametrization: of the network's output; not
    `predict_previous`, which holds for the steps of the network's own schedule alone. toward_data: its velocity points
    from noise to data.
    """

    def predict(x_t: Tensor, t: int, y: Tensor | None) -> Tensor:
        output = denoiser(network_input(schedule.alpha_bar(t), x_t, parametrization), t, y)
        if toward_data and parametrization == "predict_velocity":
            output = -output
        return to_eps(schedule, output, x_t, t, parametrization)

    return predict
