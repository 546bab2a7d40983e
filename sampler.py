"""Generate images with one backbone, with a shallow and a full one (DuoDiff), or with stages of any number."""

from __future__ import annotations

import copy
import itertools
import logging
import statistics
from collections.abc import Sequence
from contextlib import nullcontext
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
    from common.config import Config
    from diffusion import NoiseSchedule
    from diffusion.sampling import Stage
    from diffusion.solvers import Solver
    from models.inference import BackboneDenoiser, MiddleCache
    from models.loading import Network

log = logging.getLogger(__name__)


def parse_settings(argv: Sequence[str] | None) -> SamplerSettings:
    return Parser(description=__doc__).settings(SamplerSettings, argv)


@command
def main(argv: Sequence[str] | None = None) -> None:
    settings = parse_settings(argv)
    plan = plan_of(settings)

    from common.distributed import is_main, joined_processes
    from diffusion.sampling import sample
    from generation.folder import BatchUnderWay, SampleFolder, conditions_of, fingerprint
    from generation.report import write_report
    from generation.run import labels_of, noise_of, settled_run, solver_of, warm_up, with_named_classes
    from models.autoencoder import image_maker

    with joined_processes(settings.machine.device) as device:
        networks = load_networks(settings, plan, device)
        config = shared_config(networks)
        settings = with_named_classes(settings, config)
        decode, labels = image_maker(config, device), labels_of(settings, config, device)
        solver, timesteps = solver_of(settings.solver, [network.config for network in networks])
        settings = settled_run(settings, device, timesteps)
        settings, calibration = settled_switch(settings, networks, solver.schedule, device)
        plan = plan_of(settings)
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

        if is_main():
            batches = folder.finished()
            work = describe_work(plan, networks, backbones, stages, len(batches))
            summary = write_report(folder, settings, batches, work, sum(b["flops_per_image"] for b in work))
            if 0 <= (t := plan.stages[0].t_min - 1) < solver.schedule.num_timesteps and len(plan.stages) == 2:
                print(f"t_switch {t}, log-SNR {solver.schedule.log_snr(t):.3f}")
            print(", ".join(f"{backbone['name']} ran {backbone['timesteps']} timesteps" for backbone in work))
            print(summary)


def load_networks(settings: SamplerSettings, plan: Plan, device: torch.device) -> list[Network]:
    """The networks, which fit each other and the timesteps of their stages."""
    from models.loading import load_together

    place = "cpu" if settings.offload else device
    networks = load_together(plan.files, settings.stated, weights=settings.weights, device=place)
    plan.check_length(networks[-1].config.diffusion_params.num_timesteps)
    return networks


def shared_config(networks: Sequence[Network]) -> Config:
    """The last network's description, with the autoencoder that any of them names."""
    config = networks[-1].config
    named = [n.config.autoencoder for n in networks if n.config.autoencoder and n.config.autoencoder.checkpoint_path]
    return replace(config, autoencoder=named[0]) if named else config


def settled_switch(
    settings: SamplerSettings, networks: Sequence[Network], schedule: NoiseSchedule, device: torch.device
) -> tuple[SamplerSettings, Calibration | None]:
    """The settings with a timestep for --t_switch auto: that of the run that goes on, or the best by measurement.

    Times vary, so a run that goes on must not choose anew. On process 0 also the measurement, if one was made now.
    """
    if settings.logsnr_switch is not None:
        clean = [t for t in range(schedule.num_timesteps) if schedule.log_snr(t) >= settings.logsnr_switch]
        return replace(settings, t_switch=max(clean, default=-1), logsnr_switch=None), None
    if settings.t_switch != "auto":
        return settings, None

    from calibration.report import in_words
    from calibration.run import calibrate
    from calibration.settings import Measurement
    from common.distributed import on_main
    from generation.folder import recorded_switch

    calibration = None

    def choose() -> int:
        nonlocal calibration
        if not settings.overwrite and (t_switch := recorded_switch(settings.output_folder)) is not None:
            print(f"t_switch {t_switch}, as it was chosen when this run began")
            return t_switch
        measurement = Measurement(
            choice=settings.calibration,
            solver=settings.solver,
            precision=settings.speed.precision,
            batch_size=settings.batch_size,
            seed=settings.seed,
            guidance_scale=settings.guidance_scale,
            allow_outside_range=settings.allow_outside_range,
            quiet=settings.machine.quiet,
        )
        # Copies: measuring puts weights into the working precision, which is done once.
        copies = [replace(network, module=copy.deepcopy(network.module)) for network in networks]
        calibration = calibrate(measurement, copies, device)
        print(in_words(calibration))
        return calibration.chosen.t_switch(calibration.steps.timesteps)

    return replace(settings, t_switch=on_main(choose)), calibration


def save_calibration(settings: SamplerSettings, plan: Plan, calibration: Calibration | None) -> None:
    """Write the measurement behind --t_switch auto into the report of the run."""
    if calibration is not None:
        from calibration.report import save

        save(settings.output_folder / "report" / "calibration.yaml", calibration, plan.files)


def make_stages(
    settings: SamplerSettings,
    plan: Plan,
    networks: Sequence[Network],
    solver: Solver,
    timesteps: Sequence[int],
    device: torch.device,
) -> tuple[list[Stage], list[BackboneDenoiser]]:
    """The stages, and the networks in them. Raises InputError where a network does not suit its stage."""
    from common.devices import DTYPES
    from diffusion.matching import own_timesteps
    from diffusion.sampling import Stage, split_timesteps
    from generation.run import denoiser_of, guide
    from models.inference import BackboneDenoiser, Offloader
    from models.loading import check_range

    own = split_timesteps(timesteps, plan.lowest)
    times = [own_timesteps(network.config.diffusion_params, solver.schedule, timesteps) for network in networks]
    if not settings.allow_outside_range:
        for stage, visited in zip(plan.stages, own, strict=True):
            advice = f"let another network run there ({plan.source}), or give --allow_outside_range"
            check_range(networks[stage.network], [times[stage.network][t] for t in visited], advice)
    dtype = DTYPES[settings.speed.precision]
    backbones = [
        BackboneDenoiser(network.module, own_times, dtype, device, compiled=settings.speed.compile, cache=cache)
        for network, own_times, cache in zip(networks, times, make_caches(settings, plan, networks, own), strict=True)
    ]
    offloader = Offloader([network.module for network in networks], device) if settings.offload else None
    stages = []
    for stage, visited in zip(plan.stages, own, strict=True):
        config = networks[stage.network].config
        denoiser = denoiser_of(backbones[stage.network], config, solver)
        denoiser = guide(config, denoiser, stage.guidance_scale, stage.option, stage.guides)
        session = partial(offloader.resident, stage.network) if offloader else nullcontext
        stages.append(Stage(denoiser, visited, session))
    return stages, backbones


def make_caches(
    settings: SamplerSettings, plan: Plan, networks: Sequence[Network], own: Sequence[Sequence[int]]
) -> list[MiddleCache | None]:
    """Of each network the cache that --cache_interval asks for; None where it has no middle, or all is to be run.

    own: the timesteps of each stage.
    """
    from models.inference import MiddleCache, refreshing

    if settings.cache_interval == 1:
        return [None] * len(networks)
    caches: list[MiddleCache | None] = []
    for k, network in enumerate(networks):
        of_network = [
            list(alike)  # where guidance begins or ends, the batch is another one
            for stage, visited in zip(plan.stages, own, strict=True)
            for _, alike in itertools.groupby(visited, stage.guides)
            if stage.network == k
        ]
        cache = MiddleCache(settings.cache_outer, refreshing(of_network, settings.cache_interval))
        caches.append(cache if network.module.middle(settings.cache_outer) else None)
    if not any(cache and cache.refresh for cache in caches):
        most = max(network.config.model_params.num_blocks for network in networks)
        raise InputError(
            f"--cache_interval {settings.cache_interval}: no network that runs has blocks between the "
            f"{settings.cache_outer} outermost on either side (--cache_outer); the deepest has {most}"
        )
    return caches


def name_idle(plan: Plan, networks: Sequence[Network], stages: Sequence[Stage]) -> None:
    """Say which networks have none of the run's timesteps in a stage."""
    visited = [t for stage in stages for t in stage.timesteps]
    for n, (planned, stage) in enumerate(zip(plan.stages, stages, strict=True), 1):
        if not stage.timesteps:
            log.warning(
                "%s leaves the %s network (stage %d, %s) nothing to do: it has none of the %d timesteps, t = %d..%d",
                *(plan.source, plan.names[planned.network], n, networks[planned.network].path),
                *(len(visited), visited[0], visited[-1]),
            )


def compare_with_calibration(settings: SamplerSettings, plan: Plan) -> None:
    """Say where a file of stages was made for sampling that differs from this."""
    made_for = plan.calibration or {}
    for name, value in (("solver", settings.solver.solver), ("steps", settings.solver.steps)):
        if made_for.get(name, value) != value:
            log.warning("%s was made for %s %s, this is %s", plan.source, name, made_for[name], value)


def describe_work(
    plan: Plan,
    networks: Sequence[Network],
    backbones: Sequence[BackboneDenoiser],
    stages: Sequence[Stage],
    batches: int,
) -> list[dict[str, Any]]:
    """How often each network ran, for the report."""
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
