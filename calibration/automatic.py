"""The choice of a switch or of a plan at the start of a sampling run: --t_switch auto and --plan auto of sampler.py."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from calibration import plan_report, report
from calibration.plan import calibrate_plan, planned_stages
from calibration.run import calibrate
from calibration.settings import Measurement
from common.distributed import on_main
from common.errors import InputError
from generation.folder import ADVICE, recorded_stages, samples_in
from generation.settings import SamplerSettings
from generation.stages import Plan, PlannedStage, stages_described
from models.loading import Network, Runnable

Save = Callable[[Path], None]  # writes the measurement to a file of stages and its companions


def chosen_switch(
    settings: SamplerSettings, plan: Plan, networks: Sequence[Network[Runnable]], device: torch.device
) -> tuple[Plan, Save | None]:
    """The plan with the recorded switch of a continued run, or else with the best one, measured now.

    A continued run keeps its switch, because a second measurement may choose another. Process 0 also returns a function
    that saves the measurement, if this call made one. All processes must call it together.
    """
    save: Save | None = None

    def choose() -> int:
        nonlocal save
        if (recorded := _recorded(settings)) is not None:
            if len(recorded) != 2 or any(stage.saving.described for stage in recorded):
                raise InputError(f"{settings.output_folder} holds samples of a run without --t_switch; {ADVICE}")
            t_switch = recorded[0].t_min - 1
            print(f"t_switch {t_switch}, as it was chosen when this run began")
            return t_switch
        calibration = calibrate(_measurement(settings), _copies(networks), device)
        print(report.in_words(calibration))
        save = lambda path: report.save(path, calibration, plan.files)  # noqa: E731, a def would not be of this type
        return calibration.chosen.t_switch(calibration.steps.timesteps)

    return plan.switched_at(on_main(choose)), save


def chosen_plan(
    settings: SamplerSettings, plan: Plan, networks: Sequence[Network[Runnable]], device: torch.device
) -> tuple[Plan, Save | None]:
    """Like `chosen_switch`, for a plan."""
    save: Save | None = None

    def choose() -> list[PlannedStage]:
        nonlocal save
        if (recorded := _recorded(settings)) is not None:
            print(f"{len(recorded)} stages, as they were chosen when this run began")
            return recorded
        calibration = calibrate_plan(_measurement(settings), _copies(networks), device)
        print(plan_report.stage_table(calibration))
        print(plan_report.in_words(calibration))
        save = lambda path: plan_report.save(path, calibration, plan.files)  # noqa: E731
        return planned_stages(calibration.prices, calibration.chosen, settings.guidance_scale)

    return replace(plan, stages=on_main(choose), source="--plan auto"), save


def _recorded(settings: SamplerSettings) -> list[PlannedStage] | None:
    """The stages of the samples in the output folder; None if there are none to continue.

    Raises InputError for a folder with other files, before a measurement.
    """
    samples_in(settings.output_folder)
    recorded = None if settings.overwrite else recorded_stages(settings.output_folder)
    return None if recorded is None else stages_described(recorded, settings.output_folder)


def _measurement(settings: SamplerSettings) -> Measurement:
    return Measurement(
        choice=settings.calibration,
        solver=settings.solver,
        precision=settings.speed.chosen_precision,
        batch_size=settings.batch_size,
        seed=settings.seed,
        guidance_scale=settings.guidance_scale,
        allow_outside_range=settings.allow_outside_range,
        quiet=settings.machine.quiet,
    )


def _copies(networks: Sequence[Network[Runnable]]) -> list[Network[Runnable]]:
    """Copies, because a measurement converts the weights to the working precision."""
    return [replace(network, module=copy.deepcopy(network.module)) for network in networks]
