"""Generate images with one backbone, with two that take turns (DuoDiff), or with a schedule of any number."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import logging
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from calibration.options import CALIBRATION_OPTIONS, add_calibration_options
from common.cli import STEPS, T_SWITCH, Parser, architecture, existing_file, real, whole, word_or
from common.config import MOST
from common.errors import InputError, command
from generation.options import add_sampling_options, check_sampling_options, network_settings
from generation.turns import Turns, check_length, turns_of

if TYPE_CHECKING:
    import torch

    from calibration.run import Calibration
    from common.config import Config
    from models.inference import BackboneDenoiser, MiddleCache
    from models.loading import Network

log = logging.getLogger(__name__)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add_sampling_options(parser, one_network=False)
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
        type=word_or("auto", T_SWITCH),
        help="timestep: the shallow backbone runs at every t > t_switch, the full one at the rest; auto: found first, "
        "as calibrate.py does it",
    )
    add_calibration_options(parser.add_argument_group("for --t_switch auto"))
    parser.add_argument(
        "--guidance_scale_late", type=real(0, 1000), help="of the full backbone; --guidance_scale unless given"
    )
    parser.add_argument(
        "--schedule",
        type=existing_file,
        help="YAML file that names any number of networks and their timesteps, in place of --checkpoint_path",
    )
    parser.add_argument(
        "--cache_interval",
        type=STEPS,
        default=1,
        help="compute the middle blocks at every so many-th step of a network and reuse what they add between",
    )
    parser.add_argument(
        "--cache_outer",
        type=whole(1, MOST["depth"]),
        help="in blocks, and as many out blocks, that run at every step all the same; 1 unless given",
    )
    parser.add_argument(
        "--offload",
        action="store_true",
        help="keep the idle ones of several networks in host memory (CUDA); saves their memory",
    )
    args = check_sampling_options(parser, parser.parse_args(argv))
    check_networks_named(parser, args)
    check_calibration_options(parser, args)
    if args.offload and args.compile:
        parser.error("--offload moves the weights that --compile records the places of; give one of them")
    if args.cache_outer and args.cache_interval == 1:
        parser.error("--cache_outer needs a --cache_interval of 2 or more")
    args.cache_outer = args.cache_outer or 1
    if args.guidance_scale_late is None:
        args.guidance_scale_late = args.guidance_scale
    return args


def check_calibration_options(parser: Parser, args: argparse.Namespace) -> None:
    """End on options of --t_switch auto without it, and on what it cannot do."""
    if args.t_switch != "auto":
        for name in CALIBRATION_OPTIONS:
            if getattr(args, name) != parser.get_default(name):
                parser.error(f"--{name} belongs to --t_switch auto")
    elif not args.dataset:
        parser.error("--t_switch auto: measures on real images; give --dataset")
    elif args.offload or args.cache_interval > 1 or args.guidance_scale_late is not None:
        parser.error(
            "--t_switch auto: not with --offload, --cache_interval or --guidance_scale_late; run calibrate.py first"
        )


def check_networks_named(parser: Parser, args: argparse.Namespace) -> None:
    """End on options that name no network, or that name them twice."""
    of_two = ("config_path_late", "guidance_scale_late")
    if args.schedule:
        for name in ("checkpoint_path", "config_path", "checkpoint_path_late", "t_switch", *of_two):
            if getattr(args, name) is not None:
                parser.error(f"--{name} and --schedule, which says which networks run when: give one of them")
        return
    if not args.checkpoint_path:
        parser.error("give --checkpoint_path, or --schedule")
    if (args.checkpoint_path_late is None) != (args.t_switch is None):
        parser.error("--checkpoint_path_late and --t_switch go together")
    for name in (*of_two, "offload"):
        if getattr(args, name) not in (None, False) and not args.checkpoint_path_late:
            parser.error(f"--{name} needs --checkpoint_path_late")


@command
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    plan = turns_of(args)

    from common.distributed import is_main, joined_processes
    from diffusion.sampling import SwitchingDenoiser, timesteps_of_turns
    from generation.run import SamplingRun, guide, settle_speed
    from models.inference import BackboneDenoiser, Offloader

    with joined_processes(args.device) as device:
        settle_speed(args, device)
        networks = load_networks(args, plan, "cpu" if args.offload else device)
        run = SamplingRun(args, networks, shared_config(networks), device)
        calibration = None
        if args.t_switch == "auto":
            calibration = settle_switch(args, networks, device)
            plan = turns_of(args)
        own = timesteps_of_turns(run.timesteps, plan.switches)
        if not args.allow_outside_range:
            check_ranges(args, plan, networks, own)
        caches = make_caches(args, plan, networks, own)
        backbones = [
            BackboneDenoiser(network.module, run.timesteps, run.dtype, device, compiled=args.compile, cache=cache)
            for network, cache in zip(networks, caches, strict=True)
        ]
        denoisers = [
            guide(run.config, backbones[turn.network], turn.guidance_scale, turn.option) for turn in plan.turns
        ]
        offloader = Offloader([network.module for network in networks], device) if args.offload else None
        on_switch = offloader and (lambda turn: offloader(plan.turns[turn].network))
        denoiser = SwitchingDenoiser(denoisers, plan.switches, on_switch)

        run.warm_up(denoiser)
        if is_main():
            compare_with_calibration(args, plan, len(run.timesteps))
            name_idle(args, plan, networks, own)
        batches = run.run(denoiser, on_begin=calibration and (lambda: save_calibration(args, calibration)))
        if is_main():
            work = describe_work(plan, networks, backbones, own, len(batches))
            summary = run.report(batches, work, sum(b["flops_per_image"] for b in work))
            print(", ".join(f"{backbone['name']} ran {backbone['timesteps']} timesteps" for backbone in work))
            print(summary)


def settle_switch(args: argparse.Namespace, networks: Sequence[Network], device: torch.device) -> Calibration | None:
    """Put a timestep in the place of --t_switch auto: that of the run that goes on here, or the best one.

    Times vary, so a run that goes on must not choose anew. Returns, on process 0, what was measured now.
    """
    from calibration.report import in_words
    from calibration.run import calibrate
    from common.distributed import on_main
    from generation.record import ADVICE, recorded_settings, samples_in

    calibration = None

    def choose() -> int:
        nonlocal calibration
        if samples_in(args.output_folder) and not args.overwrite:
            recorded = recorded_settings(args.output_folder)
            if not isinstance(recorded, dict) or type(t_switch := recorded.get("t_switch")) is not int:
                raise InputError(f"{args.output_folder} holds samples of a run without --t_switch; {ADVICE}")
            print(f"t_switch {t_switch}, as it was chosen when this run began")
            return t_switch
        # Copies: measuring puts weights into the working precision, which is done once.
        copies = [network._replace(module=copy.deepcopy(network.module)) for network in networks]
        calibration = calibrate(args, copies, device)
        print(in_words(calibration))
        return calibration.chosen.t_switch(calibration.steps.timesteps)

    args.t_switch = on_main(choose)
    return calibration


def save_calibration(args: argparse.Namespace, calibration: Calibration) -> None:
    """Into the report of the run."""
    from calibration.report import save

    files = [(args.checkpoint_path, args.config_path), (args.checkpoint_path_late, args.config_path_late)]
    save(args.output_folder / "report" / "calibration.yaml", calibration, files, args)


def load_networks(args: argparse.Namespace, plan: Turns, device: torch.device | str) -> list[Network]:
    """The networks, which fit each other and the timesteps at which they take turns."""
    from models.loading import load_together

    flags = network_settings(args), architecture(args)
    networks = load_together(plan.files, *flags, weights=args.weights, device=device)
    check_length(args, networks[0].config.diffusion_params.num_timesteps)
    return networks


def shared_config(networks: Sequence[Network]) -> Config:
    """What the run goes by: the first network's, with the autoencoder that any of them names."""
    config = networks[0].config
    named = [n.config.autoencoder for n in networks if n.config.autoencoder and n.config.autoencoder.checkpoint_path]
    return dataclasses.replace(config, autoencoder=named[0]) if named else config


def check_ranges(
    args: argparse.Namespace, plan: Turns, networks: Sequence[Network], own: Sequence[Sequence[int]]
) -> None:
    """Raises InputError unless each network was trained on the timesteps of its turns. own: those of each turn."""
    from models.loading import check_range

    other = "--checkpoint_path_late, --t_switch" if args.schedule is None else f"see the stages in {args.schedule}"
    for turn, timesteps in zip(plan.turns, own, strict=True):
        advice = f"let another network run there ({other}), or give --allow_outside_range"
        check_range(networks[turn.network], timesteps, advice)


def make_caches(
    args: argparse.Namespace, plan: Turns, networks: Sequence[Network], own: Sequence[Sequence[int]]
) -> list[MiddleCache | None]:
    """Of each network what --cache_interval asks for; None where it has no middle, or all are to be run."""
    from models.inference import MiddleCache, refreshing

    if args.cache_interval == 1:
        return [None] * len(networks)
    caches: list[MiddleCache | None] = []
    for k, network in enumerate(networks):
        turns = [timesteps for turn, timesteps in zip(plan.turns, own, strict=True) if turn.network == k]
        cache = MiddleCache(args.cache_outer, refreshing(turns, args.cache_interval))
        caches.append(cache if network.module.middle(args.cache_outer) else None)
    if not any(cache and cache.refresh for cache in caches):
        most = max(network.config.model_params.num_blocks for network in networks)
        raise InputError(
            f"--cache_interval {args.cache_interval}: no network that runs has blocks between the {args.cache_outer} "
            f"outermost on either side (--cache_outer); the deepest has {most}"
        )
    return caches


def compare_with_calibration(args: argparse.Namespace, plan: Turns, steps: int) -> None:
    """Say where a schedule was made for sampling that differs from this."""
    for name, value in (("solver", args.solver), ("steps", steps)):
        if plan.calibration.get(name, value) != value:
            log.warning("%s was made for %s %s, this is %s", args.schedule, name, plan.calibration[name], value)


def name_idle(args: argparse.Namespace, plan: Turns, networks: Sequence[Network], own: Sequence[Sequence[int]]) -> None:
    """Say which networks have none of the run's timesteps in a turn. own: those of each turn."""
    visited = [t for timesteps in own for t in timesteps]
    for n, (turn, timesteps) in enumerate(zip(plan.turns, own, strict=True)):
        if not timesteps:
            log.warning(
                "%s leaves the %s, %s, nothing to do: none of the run's %d timesteps, t = %d..%d, is in its part",
                f"--t_switch {args.t_switch}" if args.schedule is None else f"{args.schedule}: stage {n + 1}",
                f"{plan.names()[turn.network]} network" if args.schedule is None else "network",
                networks[turn.network].path,
                len(visited),
                visited[0],
                visited[-1],
            )


def describe_work(
    plan: Turns,
    networks: Sequence[Network],
    backbones: Sequence[BackboneDenoiser],
    own: Sequence[Sequence[int]],
    batches: int,
) -> list[dict[str, Any]]:
    """What each network did, for the report."""
    from models.flops import uvit_flops

    described = []
    for k, (name, network, backbone) in enumerate(zip(plan.names(), networks, backbones, strict=True)):
        visited = [
            (t, 2 if turn.guidance_scale else 1)  # guidance runs each image twice, with its class and without
            for turn, timesteps in zip(plan.turns, own, strict=True)
            for t in timesteps
            if turn.network == k
        ]
        cache, whole = backbone.cache, uvit_flops(network.module)
        around = uvit_flops(network.module, cache.outer) if cache else whole
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
