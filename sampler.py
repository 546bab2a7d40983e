"""Generate images with one backbone, with a shallow and a full one (DuoDiff), or with any number of stages."""

from __future__ import annotations

import copy
import itertools
import logging
import statistics
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from common.cli import Parser
from common.errors import InputError, command
from generation.settings import SamplerSettings
from generation.stages import Plan, plan_of

if TYPE_CHECKING:
    import torch

    from calibration.run import Calibration
    from diffusion import NoiseSchedule
    from diffusion.sampling import Stage
    from diffusion.solvers import Solver
    from models.backbone import Backbone
    from models.inference import BackboneDenoiser, MiddleCache
    from models.loading import Network

log = logging.getLogger(__name__)


def parse_settings(argv: Sequence[str] | SamplerSettings | None) -> SamplerSettings:
    return Parser(description=__doc__).settings(SamplerSettings, argv)


@command
def main(argv: Sequence[str] | SamplerSettings | None = None) -> None:
    settings = parse_settings(argv)
    plan = plan_of(settings)

    from common.distributed import is_main, joined_processes
    from diffusion.sampling import sample
    from generation.folder import BatchUnderWay, SampleFolder, conditions_of, fingerprint
    from generation.report import most_memory, table_of_work, write_report
    from generation.run import (
        labels_of,
        noise_of,
        settled_speed,
        settled_steps,
        shared_config,
        solver_of,
        warm_up,
        with_named_classes,
    )
    from models.autoencoder import image_maker

    with joined_processes(settings.machine.device) as device:
        settings = settled_speed(settings, device)
        fetch(settings)
        networks = load_networks(settings, plan, device)
        config = shared_config([network.config for network in networks])
        settings = with_named_classes(settings, config)
        decode, labels = image_maker(config, device), labels_of(settings, config, device)
        solver, timesteps = solver_of(settings.solver, [network.config for network in networks])
        settings = settled_steps(settings, timesteps)
        plan, calibration = settled_plan(settings, plan, networks, solver.schedule, device)
        stages, backbones = make_stages(settings, plan, networks, solver, timesteps, device)

        folder = SampleFolder(settings, fingerprint(settings, networks, plan, device), conditions_of(settings, device))
        folder.open(settings.batch_size, settings.overwrite)
        if is_main():
            compare_with_calibration(settings, plan)
            name_idle(plan, networks, stages)
        shape = config.model_params.image_shape
        caching, compiled = settings.cache_interval > 1, settings.speed.compile
        warm_up(stages, folder.mine, shape, labels, device, compiled=compiled, caching=caching)
        with folder.making(len(timesteps), prepare=lambda: save_calibration(settings, plan, calibration)) as bar:
            for indices in folder.mine:
                batch = BatchUnderWay(folder, indices, decode, device, bar)
                with batch.sampling():
                    noise = noise_of(settings.seed, indices, device)
                    x0 = sample(stages, solver, noise, shape, labels(indices), batch.on_step)
                batch.save(x0)

        memory = most_memory(device)
        if is_main():
            batches = folder.finished()
            work = describe_work(plan, networks, backbones, stages, len(batches))
            flops = sum(about["flops_per_image"] for about in work)
            summary = write_report(folder, settings, batches, work, flops, memory)
            if 0 <= (t := plan.stages[0].t_min - 1) < solver.schedule.num_timesteps and len(plan.stages) == 2:
                print(f"t_switch {t}, log-SNR {solver.schedule.log_snr(t):.3f}")
            print(table_of_work(work))
            print(summary)


def fetch(settings: SamplerSettings) -> None:
    """Download the networks of --download and --download_late whose folders do not exist."""
    if settings.downloads:
        from common.distributed import on_main
        from models.hub import download

        for repo, folder in settings.downloads:
            on_main(partial(download, repo, folder, quiet=settings.machine.quiet))


def load_networks(settings: SamplerSettings, plan: Plan, device: torch.device) -> list[Network[Backbone]]:
    """Load the networks. Raises InputError unless they fit each other and the timesteps of the stages."""
    from diffusion.schedulers import process_of
    from models.loading import load_together

    networks = load_together(
        plan.files,
        settings.stated,
        weights=settings.weights,
        device=device,
        process_of=process_of,
        offload=settings.offload,
    )
    plan.check_length(networks[-1].config.diffusion_params.num_timesteps)
    return networks


def settled_plan(
    settings: SamplerSettings,
    plan: Plan,
    networks: Sequence[Network[Backbone]],
    schedule: NoiseSchedule,
    device: torch.device,
) -> tuple[Plan, Calibration | None]:
    """Replace --logsnr_switch or --t_switch auto by a timestep: for auto the recorded one of a continued run, or the
    measured best one.

    A continued run keeps its switch, because a second measurement may choose another. Process 0 also returns the
    measurement, if this call made one.
    """
    if settings.logsnr_switch is not None:
        clean = [t for t in range(schedule.num_timesteps) if schedule.log_snr(t) >= settings.logsnr_switch]
        return plan.switched_at(max(clean, default=-1)), None
    if settings.t_switch != "auto":
        return plan, None

    from calibration.report import in_words
    from calibration.run import calibrate
    from calibration.settings import Measurement
    from common.distributed import on_main
    from generation.folder import recorded_switch, samples_in

    calibration = None

    def choose() -> int:
        nonlocal calibration
        samples_in(settings.output_folder)  # refuse a folder with other files before the measurement
        if not settings.overwrite and (t_switch := recorded_switch(settings.output_folder)) is not None:
            print(f"t_switch {t_switch}, as it was chosen when this run began")
            return t_switch
        measurement = Measurement(
            choice=settings.calibration,
            solver=settings.solver,
            precision=settings.speed.chosen_precision,
            batch_size=settings.batch_size,
            seed=settings.seed,
            guidance_scale=settings.guidance_scale,
            allow_outside_range=settings.allow_outside_range,
            quiet=settings.machine.quiet,
        )
        # Copies, because the measurement converts the weights to the working precision.
        copies = [replace(network, module=copy.deepcopy(network.module)) for network in networks]
        calibration = calibrate(measurement, copies, device)
        print(in_words(calibration))
        return calibration.chosen.t_switch(calibration.steps.timesteps)

    return plan.switched_at(on_main(choose)), calibration


def save_calibration(settings: SamplerSettings, plan: Plan, calibration: Calibration | None) -> None:
    """Write the measurement behind --t_switch auto into the report of the run."""
    if calibration is not None:
        from calibration.report import save

        save(settings.output_folder / "report" / "calibration.yaml", calibration, plan.files)


def make_stages(
    settings: SamplerSettings,
    plan: Plan,
    networks: Sequence[Network[Backbone]],
    solver: Solver,
    timesteps: Sequence[int],
    device: torch.device,
) -> tuple[list[Stage], list[BackboneDenoiser]]:
    """The stages and their networks. Raises InputError if a network was not trained on the timesteps of its stage."""
    from common.devices import DTYPES
    from diffusion.matching import own_timesteps
    from diffusion.sampling import Stage, split_timesteps
    from generation.run import denoiser_of, guide
    from models.inference import BackboneDenoiser
    from models.loading import check_range
    from models.offload import on_host, session_of

    own = split_timesteps(timesteps, plan.lowest)
    times = [own_timesteps(network.config.diffusion_params, solver.schedule, timesteps) for network in networks]
    if not settings.allow_outside_range:
        for stage, visited in zip(plan.stages, own, strict=True):
            advice = f"let another network run there ({plan.source}), or give --allow_outside_range"
            check_range(networks[stage.network], [times[stage.network][t] for t in visited], advice)
    dtype = DTYPES[settings.speed.chosen_precision]
    backbones, sessions = [], []
    for network, own_times, cache in zip(networks, times, make_caches(settings, plan, networks, own), strict=True):
        module, compiled = network.module, settings.speed.compile
        with on_host(module, network.stored):
            backbones.append(BackboneDenoiser(module, own_times, dtype, device, compiled=compiled, cache=cache))
        sessions.append(session_of(module, network.stored, dtype, device))
    stages = []
    for stage, visited in zip(plan.stages, own, strict=True):
        config = networks[stage.network].config
        denoiser = denoiser_of(backbones[stage.network], config, solver)
        denoiser = guide(config, denoiser, stage.guidance_scale, stage.option, stage.guides)
        stages.append(Stage(denoiser, visited, sessions[stage.network]))
    return stages, backbones


def make_caches(
    settings: SamplerSettings, plan: Plan, networks: Sequence[Network[Backbone]], own: Sequence[Sequence[int]]
) -> list[MiddleCache | None]:
    """The cache of each network for --cache_interval; None for a network without middle blocks or without caching.

    own: the timesteps of each stage.
    """
    from models.inference import MiddleCache, refreshing

    outer = settings.cache_outer
    if outer is None:  # --cache_interval 1
        return [None] * len(networks)
    caches: list[MiddleCache | None] = []
    for k, network in enumerate(networks):
        of_network = [
            list(alike)  # the batch has another size where guidance begins or ends
            for stage, visited in zip(plan.stages, own, strict=True)
            for _, alike in itertools.groupby(visited, stage.guides)
            if stage.network == k
        ]
        cache = MiddleCache(outer, refreshing(of_network, settings.cache_interval))
        caches.append(cache if network.module.middle(outer) else None)
    if not any(cache and cache.refresh for cache in caches):
        most = max(network.config.model_params.num_blocks for network in networks)
        raise InputError(
            f"--cache_interval {settings.cache_interval}: no network that runs has blocks between the "
            f"{outer} outermost on either side (--cache_outer); the deepest has {most}"
        )
    return caches


def name_idle(plan: Plan, networks: Sequence[Network[Backbone]], stages: Sequence[Stage]) -> None:
    """Warn about stages without a timestep of the run."""
    visited = [t for stage in stages for t in stage.timesteps]
    for n, (planned, stage) in enumerate(zip(plan.stages, stages, strict=True), 1):
        if not stage.timesteps:
            log.warning(
                "%s leaves stage %d (%s, %s) nothing to do: it has none of the %d timesteps, t = %d..%d",
                *(plan.source, n, plan.names[planned.network], networks[planned.network].path),
                *(len(visited), visited[0], visited[-1]),
            )


def compare_with_calibration(settings: SamplerSettings, plan: Plan) -> None:
    """Warn if the file of stages was calibrated for another solver or number of steps."""
    made_for = plan.calibration or {}
    for name, value in (("solver", settings.solver.solver), ("steps", settings.solver.steps)):
        if made_for.get(name, value) != value:
            log.warning("%s was made for %s %s, this is %s", plan.source, name, made_for[name], value)


def describe_work(
    plan: Plan,
    networks: Sequence[Network[Backbone]],
    backbones: Sequence[BackboneDenoiser],
    stages: Sequence[Stage],
    batches: int,
) -> list[dict[str, Any]]:
    """The number of calls and the FLOPs of each network, for the report."""
    from models.flops import backbone_flops

    described = []
    for k, (name, network, backbone) in enumerate(zip(plan.names, networks, backbones, strict=True)):
        visited = [
            (t, 2 if planned.guides(t) else 1)  # guidance runs each image twice, with its class and without
            for planned, stage in zip(plan.stages, stages, strict=True)
            for t in stage.timesteps
            if planned.network == k
        ]
        cache, whole = backbone.cache, backbone_flops(network.module)
        around = backbone_flops(network.module, cache.outer) if cache else whole
        reused = {t for t, _ in visited if cache and cache.reuses(t)}
        costs = [passes * (around if t in reused else whole) for t, passes in visited]
        work = {
            "name": name,
            "timesteps": len(visited),
            "calls": len(visited) * batches,
            "flops_per_image_call": statistics.mean(costs or [whole]),
            "flops_per_image": sum(costs),
        }
        if cache:
            work["timesteps_reusing"] = len(reused)
        described.append(work | network.describe())
    return described


if __name__ == "__main__":
    main()
