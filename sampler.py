"""Generate images with one backbone, or with two that take turns (DuoDiff)."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from common.cli import Parser, existing_file, whole
from common.errors import InputError, command
from generation.options import add_sampling_options, check_sampling_options


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add_sampling_options(parser)
    parser.add_argument(
        "--checkpoint_path_late",
        type=existing_file,
        help="the full backbone; --checkpoint_path is then the shallow one",
    )
    parser.add_argument(
        "--config_path_late", type=existing_file, help="YAML file of the full backbone, like --config_path"
    )
    parser.add_argument(
        "--t_switch",
        type=whole(-1),
        help="timestep: the shallow backbone runs at every t > t_switch, the full one at the rest",
    )
    args = check_sampling_options(parser, parser.parse_args(argv))
    if (args.checkpoint_path_late is None) != (args.t_switch is None):
        parser.error("--checkpoint_path_late and --t_switch go together")
    if args.config_path_late and not args.checkpoint_path_late:
        parser.error("--config_path_late needs --checkpoint_path_late")
    return args


@command
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)

    from common.devices import pick_device
    from diffusion.sampling import SwitchingDenoiser
    from generation.run import SamplingRun
    from models.flops import uvit_flops
    from models.loading import check_pair, load_network, stated_settings

    device = pick_device(args.device)
    given = {"parametrization": args.parametrization}
    how = {"model": "uvit", "weights": args.weights, "device": device}
    networks = {"backbone": load_network(args.checkpoint_path, stated_settings(args.config_path, given), **how)}
    if args.checkpoint_path_late:
        shallow = networks.pop("backbone")
        full = load_network(args.checkpoint_path_late, stated_settings(args.config_path_late, given), **how)
        check_pair(shallow, full)
        check_switch(args.t_switch, shallow.config.diffusion_params.num_timesteps)
        networks = {"shallow": shallow, "full": full}
    denoiser = SwitchingDenoiser(
        [network.module for network in networks.values()], [args.t_switch] if len(networks) == 2 else []
    )

    run = SamplingRun(args, next(iter(networks.values())).config, device)
    run.warm_up(*denoiser.denoisers)
    timing = run.run(denoiser)

    batches = -(-args.n_samples // args.batch_size)
    steps = denoiser.steps_of_each(run.timesteps)
    backbones = [
        {
            "name": name,
            "timesteps": n,
            "calls": n * batches,
            "flops_per_image_call": uvit_flops(network.module),
        }
        | network.describe()
        for (name, network), n in zip(networks.items(), steps, strict=True)
    ]
    flops = sum(backbone["timesteps"] * backbone["flops_per_image_call"] for backbone in backbones)
    run.write_statistics(timing, backbones, flops)
    print(", ".join(f"{backbone['name']} ran {backbone['timesteps']} timesteps" for backbone in backbones))
    print(run.summary(timing))


def check_switch(t_switch: int, num_timesteps: int) -> None:
    if t_switch > num_timesteps - 1:
        raise InputError(f"--t_switch {t_switch} is out of range, wanted -1..{num_timesteps - 1}")


if __name__ == "__main__":
    main()
