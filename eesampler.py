"""Generate images with an early-exit model, in which each image exits at the first layer that is certain enough."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from common.cli import Parser
from common.errors import command
from generation.settings import EarlyExitSettings
from generation.stages import Plan, one_stage

if TYPE_CHECKING:
    import numpy as np
    import torch

    from models.early_exit import EarlyExitUViT
    from models.loading import Network


def parse_settings(argv: Sequence[str] | EarlyExitSettings | None) -> EarlyExitSettings:
    return Parser(description=__doc__).settings(EarlyExitSettings, argv)


@command
def main(argv: Sequence[str] | EarlyExitSettings | None = None) -> None:
    settings = parse_settings(argv)
    plan = one_stage(settings)

    from common.devices import DTYPES
    from common.distributed import is_main, joined_processes
    from diffusion.matching import own_timesteps
    from diffusion.sampling import Stage, sample
    from generation.exits import ExitRecorder, save_exits
    from generation.folder import BatchUnderWay, SampleFolder, conditions_of, fingerprint
    from generation.report import most_memory, table_of_work, write_report
    from generation.run import (
        labels_of,
        noise_of,
        readable,
        settled_speed,
        settled_steps,
        solver_of,
        warm_up,
        with_named_classes,
    )
    from models.autoencoder import image_maker
    from models.inference import EarlyExitTracer
    from models.loading import check_range

    with joined_processes(settings.machine.device) as device:
        settings = settled_speed(settings, device)
        network = load(settings, plan, device)
        config, model = network.config, network.module
        settings = with_named_classes(settings, config)
        decode, labels = image_maker(config, device), labels_of(settings, config, device)
        solver, timesteps = solver_of(settings.solver, [config])
        settings = settled_steps(settings, timesteps)
        times = own_timesteps(config.diffusion_params, solver.schedule, timesteps)
        if not settings.allow_outside_range:
            check_range(network, list(times.values()), "give --allow_outside_range to permit this")
        trace = EarlyExitTracer(
            model,
            times,
            DTYPES[settings.speed.chosen_precision],
            device,
            threshold=settings.threshold,
            min_group=settings.min_group,
            compiled=settings.speed.compile,
        )
        recorder = ExitRecorder(trace, passes=2 if settings.guidance_scale else 1)
        denoiser = readable(recorder, config, solver, settings.guidance_scale)
        stages = [Stage(denoiser, timesteps)]

        folder = SampleFolder(settings, fingerprint(settings, [network], plan, device), conditions_of(settings, device))
        folder.open(settings.batch_size, settings.overwrite)
        shape = config.model_params.image_shape
        whole = [Stage(lambda *inputs: model(*inputs).output, timesteps)]
        warm_up(whole, folder.mine, shape, labels, device, compiled=settings.speed.compile)
        with folder.making(len(timesteps)) as bar:
            for indices in folder.mine:
                batch = BatchUnderWay(folder, indices, decode, device, bar)
                with batch.sampling():
                    noise = noise_of(settings.seed, indices, device)
                    x0 = sample(stages, solver, noise, shape, labels(indices), batch.on_step)
                batch.save(x0, recorder.end_batch())

        memory = most_memory(device)
        if is_main():
            batches = folder.finished()
            exits = save_exits(
                folder.report, timesteps, [batch.arrays for batch in batches], settings.threshold, model.num_layers
            )
            work = describe_work(network, exits, len(batches), settings)
            print(table_of_work([work]))
            print(f"mean exit layer {work['mean_exit_layer']:.2f} of {model.num_layers}")
            print(write_report(folder, settings, batches, [work], work["flops_per_image"], memory))


def load(settings: EarlyExitSettings, plan: Plan, device: torch.device) -> Network[EarlyExitUViT]:
    """Load the early-exit model. Raises InputError for a file that does not fit."""
    from models.early_exit import EarlyExitUViT
    from models.loading import described_by, load_network, stated_settings

    ((path, config_path),) = plan.files
    return load_network(
        path,
        stated_settings(config_path, settings.stated),
        EarlyExitUViT,
        described=described_by(config_path),
        weights=settings.weights,
        device=device,
    )


def describe_work(
    network: Network[EarlyExitUViT], exits: Mapping[str, np.ndarray], batches: int, settings: EarlyExitSettings
) -> dict[str, Any]:
    """The mean exit layer and the FLOPs, for the report. exits: the arrays returned by `save_exits`."""
    import numpy as np

    from models.flops import early_exit_flops

    costs = early_exit_flops(network.module)
    layers = np.concatenate([exits[name] for name in ("exit_layer", "exit_layer_uncond") if name in exits])
    timesteps = len(exits["timesteps"])
    return {
        "name": "early exit",
        "timesteps": timesteps,
        "calls": timesteps * batches,
        "flops_per_image_call": costs[-1],
        "flops_per_image": float(np.asarray(costs, dtype=float)[layers].sum()) / settings.n_samples,
        "mean_exit_layer": float(layers.mean()),
        **network.describe(),
    }


if __name__ == "__main__":
    main()
