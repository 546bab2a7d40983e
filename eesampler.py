"""Generate images with an early-exit model, which stops computing an image at the layer where it may."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from common.cli import BATCH_SIZE, Parser, architecture, real
from common.config import CLASSIFIER_TYPES
from common.errors import command
from generation.options import add_sampling_options, check_sampling_options, network_settings

if TYPE_CHECKING:
    from generation.record import Batch
    from generation.run import SamplingRun
    from models.loading import Network


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add_sampling_options(parser)
    parser.add_argument(
        "--threshold",
        type=real(0, 1),
        required=True,
        help="an image leaves at the first layer whose predicted uncertainty is at or below this",
    )
    parser.add_argument(
        "--min_group",
        type=BATCH_SIZE,
        default=1,
        help="images that left stay in the batch until so many wait; changes the time alone",
    )
    parser.add_argument("--classifier_type", choices=CLASSIFIER_TYPES, help="the probes, like the network's options")
    args = check_sampling_options(parser, parser.parse_args(argv))
    if args.min_group > args.batch_size:
        parser.error(f"--min_group {args.min_group}: --batch_size {args.batch_size} never has so many to wait for")
    return args


@command
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)

    from common.distributed import is_main, joined_processes
    from generation.exits import ExitRecorder
    from generation.run import SamplingRun, guide, settle_speed
    from models.inference import EarlyExitTracer
    from models.loading import check_range, described_by, load_network, stated_settings

    with joined_processes(args.device) as device:
        settle_speed(args, device)
        flags = {**network_settings(args), **architecture(args), "classifier_type": args.classifier_type}
        network = load_network(
            *(args.checkpoint_path, stated_settings(args.config_path, flags)),
            described=described_by(args.config_path),
            model="deediff_uvit",
            weights=args.weights,
            device=device,
        )
        run = SamplingRun(args, [network], network.config, device)
        if not args.allow_outside_range:
            check_range(network, run.timesteps, "give --allow_outside_range to let it")
        limits = {"threshold": args.threshold, "min_group": args.min_group}
        trace = EarlyExitTracer(network.module, run.timesteps, run.dtype, device, compiled=args.compile, **limits)
        recorder = ExitRecorder(trace, passes=2 if args.guidance_scale else 1)
        denoiser = guide(network.config, recorder, args.guidance_scale)
        run.warm_up(network.module)
        batches = run.run(denoiser, of_batch=recorder.end_batch)
        if is_main():
            report(args, run, network, batches)


def report(args: argparse.Namespace, run: SamplingRun, network: Network, batches: Sequence[Batch]) -> None:
    """Write where the images left the network, and what that saved."""
    import numpy as np

    from common.plots import plot_exit_layers
    from generation.exits import save_exits
    from models.flops import early_exit_flops

    folder = run.folder / "report"
    exits = save_exits(folder / "exits.npz", run.timesteps, [batch.arrays for batch in batches], args.threshold)
    depth = network.module.num_layers
    plot_exit_layers(folder / "exit_layer.png", exits["timesteps"], exits["exit_layer"], depth, args.threshold)

    costs = early_exit_flops(network.module)
    layers = np.concatenate([exits[name] for name in ("exit_layer", "exit_layer_uncond") if name in exits])
    flops = float(np.asarray(costs, dtype=float)[layers].sum())
    mean_exit = float(layers.mean())
    backbone = {
        "name": "early exit",
        "timesteps": len(run.timesteps),
        "calls": len(run.timesteps) * len(batches),
        "flops_per_image_call": costs[-1],
        "mean_exit_layer": mean_exit,
    }
    summary = run.report(batches, [backbone | network.describe()], flops / args.n_samples)
    print(f"mean exit layer {mean_exit:.2f} of {depth}")
    print(summary)


if __name__ == "__main__":
    main()
