"""Generate images with one backbone, or with two that take turns (DuoDiff)."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from common.cli import Parser, existing_file, real, whole
from common.errors import InputError, command
from generation.options import add_sampling_options, check_sampling_options, network_settings

if TYPE_CHECKING:
    import torch

    from common.config import Config
    from models.loading import Network


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
    parser.add_argument(
        "--guidance_scale_late", type=real(0, 1000), help="of the full backbone; --guidance_scale if not said"
    )
    parser.add_argument(
        "--offload",
        action="store_true",
        help="keep the idle one of two networks in host memory (CUDA); saves its memory",
    )
    args = check_sampling_options(parser, parser.parse_args(argv))
    if (args.checkpoint_path_late is None) != (args.t_switch is None):
        parser.error("--checkpoint_path_late and --t_switch go together")
    for name in ("config_path_late", "guidance_scale_late", "offload"):
        if getattr(args, name) not in (None, False) and not args.checkpoint_path_late:
            parser.error(f"--{name} needs --checkpoint_path_late")
    if args.offload and args.compile:
        parser.error("--offload moves the weights that --compile records the places of; give one of them")
    if args.guidance_scale_late is None:
        args.guidance_scale_late = args.guidance_scale
    return args


@command
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)

    from common.distributed import is_main, joined_processes
    from diffusion.sampling import SwitchingDenoiser
    from generation.run import SamplingRun, settle_speed
    from models.inference import BackboneDenoiser, Offloader
    from models.loading import check_range

    with joined_processes(args.device) as device:
        settle_speed(args, device)
        networks = load_networks(args, "cpu" if args.offload else device)
        run = SamplingRun(args, networks, shared_config(networks), device)
        backbones = [
            BackboneDenoiser(n.module, run.timesteps, run.dtype, device, compiled=args.compile) for n in networks
        ]
        denoisers = [run.guide(backbones[0], args.guidance_scale)]
        switches = []
        if len(networks) == 2:
            denoisers.append(run.guide(backbones[1], args.guidance_scale_late, "--guidance_scale_late"))
            switches.append(args.t_switch)
        offloader = Offloader([n.module for n in networks], device) if args.offload else None
        denoiser = SwitchingDenoiser(denoisers, switches, on_switch=offloader)
        if not args.allow_outside_range:
            advice = "let another network run there (--checkpoint_path_late, --t_switch), or give --allow_outside_range"
            for network, timesteps in zip(networks, denoiser.timesteps_of_each(run.timesteps), strict=True):
                check_range(network, timesteps, advice)

        run.warm_up(denoiser)
        batches = run.run(denoiser)
        if is_main():
            work = describe_work(args, networks, denoiser.steps_of_each(run.timesteps), len(batches))
            summary = run.report(batches, work, sum(b["timesteps"] * b["flops_per_image_call"] for b in work))
            print(", ".join(f"{backbone['name']} ran {backbone['timesteps']} timesteps" for backbone in work))
            print(summary)


def load_networks(args: argparse.Namespace, device: torch.device | str) -> list[Network]:
    """The backbone, or the shallow and the full one, which fit each other and t_switch."""
    from models.loading import check_pair, load_network, stated_settings

    networks = []
    for checkpoint, config in (
        (args.checkpoint_path, args.config_path),
        (args.checkpoint_path_late, args.config_path_late),
    ):
        if checkpoint:
            stated = stated_settings(config, network_settings(args))
            networks.append(load_network(checkpoint, stated, model="uvit", weights=args.weights, device=device))
    if len(networks) == 2:
        check_pair(*networks)
        last = networks[0].config.diffusion_params.num_timesteps - 1
        if args.t_switch > last:
            raise InputError(f"--t_switch {args.t_switch} is out of range, wanted -1..{last}")
    return networks


def shared_config(networks: Sequence[Network]) -> Config:
    """What the run goes by: the first network's, with the autoencoder that either names."""
    config = networks[0].config
    named = [n.config.autoencoder for n in networks if n.config.autoencoder and n.config.autoencoder.checkpoint_path]
    return dataclasses.replace(config, autoencoder=named[0]) if named else config


def describe_work(
    args: argparse.Namespace, networks: Sequence[Network], steps: Sequence[int], batches: int
) -> list[dict[str, Any]]:
    """What each network did, for the report."""
    from models.flops import uvit_flops

    names = ("shallow", "full") if len(networks) == 2 else ("backbone",)
    scales = (args.guidance_scale, args.guidance_scale_late)
    return [
        {
            "name": name,
            "timesteps": n,
            "calls": n * batches,
            # Guidance runs each image twice, with its class and without.
            "flops_per_image_call": uvit_flops(network.module) * (2 if scale else 1),
        }
        | network.describe()
        for name, network, n, scale in zip(names, networks, steps, scales, strict=False)
    ]


if __name__ == "__main__":
    main()
