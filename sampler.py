"""Generate images with one backbone, with a shallow and a full one (DuoDiff), or with any number of stages."""

from __future__ import annotations

if __name__ == "__main__":
    from common.startup import end_in_one_line

    end_in_one_line()  # on a signal during the imports below

import logging
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from common.cli import Parser, silence
from common.errors import command
from generation.settings import SamplerSettings
from generation.stages import Plan, plan_of

if TYPE_CHECKING:
    import torch

    from calibration.automatic import Save
    from diffusion import NoiseSchedule
    from diffusion.sampling import Stage
    from models.loading import Network, Runnable

log = logging.getLogger(__name__)


def parse_settings(argv: Sequence[str] | SamplerSettings | None) -> SamplerSettings:
    return Parser(description=__doc__).settings(SamplerSettings, argv)


@command
def main(argv: Sequence[str] | SamplerSettings | None = None) -> None:
    settings = parse_settings(argv)
    silence(settings.machine.quiet)
    plan = plan_of(settings)

    from common.devices import DTYPES
    from common.distributed import is_main, joined_processes
    from diffusion.sampling import sample
    from generation.denoisers import make_stages
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
        configs = [network.config for network in networks]
        solver, timesteps = solver_of(settings.solver, configs, plan.forecasts_noise or bool(settings.plan))
        settings = settled_steps(settings, timesteps)
        plan, save_choice = settled_plan(settings, plan, networks, solver.schedule, device)
        stages = make_stages(
            *(plan, networks, solver, timesteps, DTYPES[settings.speed.chosen_precision], device),
            compiled=settings.speed.compile,
            allow_outside_range=settings.allow_outside_range,
        )

        folder = SampleFolder(settings, fingerprint(settings, networks, plan, device), conditions_of(settings, device))
        folder.open(settings.batch_size, settings.overwrite)
        if is_main():
            compare_with_calibration(settings, plan)
            if settings.checkpoint_path_late is not None:
                ask_if_swapped(networks)
            name_idle(plan, networks, stages)
        shape = config.model_params.image_shape
        warm_up(stages, folder.mine, shape, labels, device, compiled=settings.speed.compile, saving=plan.saves)
        with folder.making(len(timesteps), save_choice) as bar:
            for indices in folder.mine:
                batch = BatchUnderWay(folder, indices, decode, device, bar)
                with batch.sampling():
                    noise = noise_of(settings.seed, indices, device)
                    x0 = sample(stages, solver, noise, shape, labels(indices), batch.on_step)
                batch.save(x0)

        memory = most_memory(device)
        if is_main():
            batches = folder.finished()
            work = describe_work(plan, networks, stages, len(batches))
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


def load_networks(settings: SamplerSettings, plan: Plan, device: torch.device) -> list[Network[Runnable]]:
    """Load the networks. Raises InputError unless they fit each other and the timesteps of the stages."""
    from diffusion.schedulers import process_of
    from models.loading import load_together

    networks = load_together(
        plan.files,
        settings.stated,
        with_exits=None if settings.plan else plan.with_exits,
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
    networks: Sequence[Network[Runnable]],
    schedule: NoiseSchedule,
    device: torch.device,
) -> tuple[Plan, Save | None]:
    """The plan with the timestep of --logsnr_switch, or with the choice of --t_switch auto or --plan auto.

    Process 0 also returns a function that saves the measurement, if there was one.
    """
    if settings.logsnr_switch is not None:
        clean = [t for t in range(schedule.num_timesteps) if schedule.log_snr(t) >= settings.logsnr_switch]
        return plan.switched_at(max(clean, default=-1)), None
    if settings.plan is None and settings.t_switch != "auto":
        return plan, None

    from calibration.automatic import chosen_plan, chosen_switch

    choose = chosen_plan if settings.plan else chosen_switch
    return choose(settings, plan, networks, device)


def ask_if_swapped(networks: Sequence[Network[Runnable]]) -> None:
    """Warn if the shallow network, the first of two, costs more than the full one."""
    from generation.denoisers import Call, flops_of

    first, last = (flops_of(Call(k, passes=1), networks) for k in (0, 1))
    if first > last:
        log.warning(
            "the network of the first stage costs more than that of the last (%.3g against %.3g GFLOP per call): were "
            "--checkpoint_path and --checkpoint_path_late swapped?",
            *(first / 1e9, last / 1e9),
        )


def name_idle(plan: Plan, networks: Sequence[Network[Runnable]], stages: Sequence[Stage]) -> None:
    """Warn about stages without a timestep of the run."""
    visited = [t for stage in stages for t in stage.timesteps]
    for n, (planned, stage) in enumerate(zip(plan.stages, stages, strict=True), 1):
        if not stage.timesteps:
            log.warning(
                "%s: stage %d (%s, %s) does not run: it contains none of the %d timesteps, t = %d..%d",
                *(plan.source, n, plan.names[planned.network], networks[planned.network].path),
                *(len(visited), visited[0], visited[-1]),
            )


def compare_with_calibration(settings: SamplerSettings, plan: Plan) -> None:
    """Warn if the file of stages was calibrated for another solver or number of steps."""
    made_for = plan.calibration or {}
    for name, value in (("solver", settings.solver.solver), ("steps", settings.solver.steps)):
        if made_for.get(name, value) != value:
            log.warning("%s was made for %s %s, not %s", plan.source, name, made_for[name], value)


def describe_work(
    plan: Plan, networks: Sequence[Network[Runnable]], stages: Sequence[Stage], batches: int
) -> list[dict[str, Any]]:
    """The timesteps of the stages of each network, its number of calls and its FLOPs, for the report.

    A network that is held or corrects another is not called at all these timesteps.
    """
    from generation.denoisers import Call, calls_of, flops_of, reuses

    calls = Counter(
        call
        for planned, stage in zip(plan.stages, stages, strict=True)
        for call in calls_of(planned, stage.timesteps, networks)
    )
    described = []
    for k, (name, network) in enumerate(zip(plan.names, networks, strict=True)):
        own = {call: count for call, count in calls.items() if call.network == k}
        flops, n_calls = sum(count * flops_of(call, networks) for call, count in own.items()), sum(own.values())
        of_network = [stage for planned, stage in zip(plan.stages, stages, strict=True) if k in planned.networks]
        work = {
            "name": name,
            "timesteps": sum(len(stage.timesteps) for stage in of_network),
            "calls": n_calls * batches,
            "flops_per_image_call": flops / n_calls if n_calls else flops_of(Call(k, passes=1), networks),
            "flops_per_image": flops,
        }
        if any(planned.network == k and reuses(planned, networks) for planned in plan.stages):
            work["timesteps_reusing"] = sum(count for call, count in own.items() if call.outer is not None)
        described.append(work | network.describe())
    return described


if __name__ == "__main__":
    main()
