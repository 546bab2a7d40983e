"""The process of a network as a scheduler of diffusers describes it, in this project's words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from common.errors import InputError
from common.settings import shown
from diffusion.ddpm import NoiseSchedule

PREDICTIONS = {"epsilon": "predict_noise", "sample": "predict_original", "v_prediction": "predict_v"}
SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}


def process_of(about: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The parametrization and the diffusion_params of a network whose time input is the 0-based t.

    about: the content of scheduler_config.json, of which the scheduler's steps (variance, clipping, spacing of
    timesteps) are left out: the sampler has its own. where: the file, named in the InputError for a process that this
    project does not have.
    """
    name = about.get("_class_name", "the scheduler")
    prediction = about.get("prediction_type", "epsilon")
    if not isinstance(prediction, str) or prediction not in PREDICTIONS:
        raise InputError(f"{where}: prediction_type {shown(prediction)}: wanted one of {', '.join(PREDICTIONS)}")
    if about.get("rescale_betas_zero_snr"):
        raise InputError(f"{where}: rescale_betas_zero_snr gives a noise schedule that is not supported")
    betas, schedule = about.get("trained_betas"), about.get("beta_schedule")
    if betas is not None:
        diffusion = named_schedule(betas, f"{where}: trained_betas")
    elif isinstance(schedule, str) and schedule in SCHEDULES:
        numbers = {key: about[key] for key in ("beta_start", "beta_end") if key in about}
        if "num_train_timesteps" in about:
            numbers["num_timesteps"] = about["num_train_timesteps"]
        diffusion = {"beta_schedule": SCHEDULES[schedule], **numbers}
    else:
        raise InputError(
            f"{where}: {name} with beta_schedule {shown(schedule)}: wanted one of {', '.join(SCHEDULES)}; give a "
            "scheduler with betas"
        )
    return {"parametrization": PREDICTIONS[prediction], "diffusion_params": diffusion}


def named_schedule(betas: Sequence[float], where: str) -> dict[str, Any]:
    """The arguments of the NoiseSchedule that has these betas. Raises InputError, which begins with `where`."""
    try:
        given = torch.tensor(betas, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        given = torch.zeros(0)
    if given.ndim != 1 or not len(given) or not ((given > 0) & (given < 1)).all():
        raise InputError(f"{where}: wanted a list of numbers between 0 and 1")
    for schedule in _like(given):
        try:
            table = NoiseSchedule(**schedule).betas
        except InputError:
            continue
        if torch.allclose(table, given, rtol=1e-5, atol=1e-9):  # the given betas have 32 bits
            return schedule
    raise InputError(f"{where} fit no supported noise schedule")


def _like(betas: torch.Tensor) -> Iterator[dict[str, Any]]:
    """The schedules of each kind that these betas might be of."""
    count, first, last = len(betas), float(betas[0]), float(betas[-1])
    for name in ("linear", "scaled_linear", "cosine", "rectified_flow"):
        ends = {"beta_start": first, "beta_end": last} if name.endswith("linear") else {}
        yield {"num_timesteps": count, "beta_schedule": name, **ends}
    # Minus log alpha bar is least * time + rise * time^2 / 2 in the continuous process, here at 1 / T and at 1.
    spent, time = -torch.log1p(-betas).cumsum(0), 1 / count
    if count > 1:
        rise = 2 * float(spent[0] - spent[-1] * time) / (time**2 - time)
        least = float(spent[-1]) - rise / 2
        ends = {"beta_start": least / count, "beta_end": (least + rise) / count}
        yield {"num_timesteps": count, "beta_schedule": "continuous_vp", **ends}
