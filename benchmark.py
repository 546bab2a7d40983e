"""Measure how fast sampling, early exit and training are on this machine, beside what their FLOPs promise."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import (
    BATCH_SIZE,
    STEPS,
    T_SWITCH,
    Parser,
    add_common_options,
    add_model_options,
    any_path,
    architecture,
    existing_file,
    task_settings,
    whole,
)
from common.config import PRECISIONS, SOLVERS
from common.errors import InputError, command

if TYPE_CHECKING:
    import torch

    from models.loading import Network

CONFIGS = Path(__file__).parent / "configs"


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{sample,early-exit,train}")

    def add(name: str, network: str, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.add_argument("--rounds", type=whole(1, 1_000_000), default=3, help="times everything is measured, in turns")
        sub.add_argument("--precision", choices=PRECISIONS, nargs="+", help="one or several; see sampler.py --help")
        sub.add_argument("--compile", action="store_true", help="compile the networks first (torch.compile)")
        sub.add_argument(
            "--output_folder", type=any_path, default=Path("out/benchmark"), help="JSON and a picture go here"
        )
        add_common_options(sub)
        add_model_options(sub, f"network of {network} (each beats a YAML file)")
        sub.add_argument("--config_path", type=existing_file, help=f"YAML file of {network}, for weights without one")
        return sub

    network = "a YAML file (the weights are then random) or a checkpoint"
    sample = add("sample", "--full", "network calls, whole sampling runs, and DuoDiff at several switches")
    sample.add_argument("--full", type=existing_file, default=CONFIGS / "uvit_celeba.yaml", help=network)
    sample.add_argument("--shallow", type=existing_file, default=CONFIGS / "uvit_celeba_3.yaml", help=network)
    sample.add_argument("--batch_size", type=BATCH_SIZE, default=8, help="samples made at a time")
    sample.add_argument("--solver", choices=SOLVERS, nargs="+", default=["ddpm", "dpmsolver++"], help="one or several")
    sample.add_argument("--steps", type=STEPS, default=20, help="network calls per image")
    sample.add_argument("--t_switch", type=T_SWITCH, nargs="+", default=[300, 500, 699], help="one or several")

    exits = add("early-exit", "--model", "exits forced to every layer, and spread over the layers")
    exits.add_argument("--model", type=existing_file, default=CONFIGS / "deediff_celeba.yaml", help=network)
    exits.add_argument("--batch_size", type=BATCH_SIZE, default=64, help="images in a call")
    exits.add_argument("--min_group", type=BATCH_SIZE, nargs="+", default=[1, 8], help="one or several, of the spread")

    train = add("train", "--model", "optimiser steps")
    train.add_argument("--model", type=existing_file, default=CONFIGS / "uvit_celeba.yaml", help=network)
    train.add_argument("--batch_size", type=BATCH_SIZE, default=16, help="images per step")
    train.add_argument("--freeze_backbone", action="store_true", help="of an early-exit model")
    return parser.parse_args(argv)


@command
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)

    from benchmarking.measure import describe_machine
    from benchmarking.report import draw
    from common.devices import check_compiler, pick_device, pick_precision
    from common.files import read_json, writable_folder, write_json

    device = pick_device(args.device)
    precisions = [pick_precision(name, device) for name in args.precision or [None]]
    if args.compile:
        check_compiler(device)
    folder = writable_folder(args.output_folder)
    measure, to_text = COMMANDS[args.command](args, device)

    machine = describe_machine(device)
    print(", ".join(f"{name}: {value}" for name, value in machine.items()), end="\n\n")
    measured = []
    for precision in precisions:
        measured.append(measure(precision))
        print(to_text(measured[-1]))
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    write_json(folder / f"{args.command}.json", {"machine": machine, "settings": settings, "measured": measured})

    there = {name: folder / f"{name}.json" for name in COMMANDS}
    draw(folder / "benchmark.png", {name: read_json(path) for name, path in there.items() if path.exists()})
    print(f"-> {folder}")


Measurement = Callable[[str], dict[str, Any]]  # by precision
ToText = Callable[[dict[str, Any]], str]


def prepare_sampling(args: argparse.Namespace, device: torch.device) -> tuple[Measurement, ToText]:
    from benchmarking.report import sampling_tables
    from benchmarking.sampling import measure_sampling
    from diffusion import NoiseSchedule
    from diffusion.solvers import make_solver, spaced_timesteps
    from models.loading import check_pair

    full, shallow = open_network(args.full, "uvit", args), open_network(args.shallow, "uvit")
    check_pair(shallow, full)
    config = full.config
    num_timesteps = config.diffusion_params.num_timesteps
    if (highest := max(args.t_switch)) >= num_timesteps:
        raise InputError(f"--t_switch {highest} is out of range, wanted -1..{num_timesteps - 1}")
    spaced_timesteps(num_timesteps, args.steps)
    for solver in args.solver:
        make_solver(solver, NoiseSchedule(**config.diffusion_params.schedule), config.parametrization)

    def measure(precision: str) -> dict[str, Any]:
        return measure_sampling(args, copy_of(full, device), copy_of(shallow, device), precision, device)

    return measure, sampling_tables


def prepare_early_exit(args: argparse.Namespace, device: torch.device) -> tuple[Measurement, ToText]:
    from benchmarking.early_exit import measure_early_exit
    from benchmarking.report import early_exit_table

    network = open_network(args.model, "deediff_uvit", args)

    def measure(precision: str) -> dict[str, Any]:
        return measure_early_exit(args, copy_of(network, device), precision, device)

    return measure, early_exit_table


def prepare_training(args: argparse.Namespace, device: torch.device) -> tuple[Measurement, ToText]:
    from benchmarking.report import training_table
    from benchmarking.training import measure_training

    network = open_network(args.model, None, args)
    if network.config.model == "uvit" and args.freeze_backbone:
        raise InputError(f"--freeze_backbone is for early-exit models; {args.model} is a backbone")

    def measure(precision: str) -> dict[str, Any]:
        return measure_training(args, copy_of(network, device), precision, device)

    return measure, training_table


COMMANDS = {"sample": prepare_sampling, "early-exit": prepare_early_exit, "train": prepare_training}


def open_network(path: Path, model: str | None = None, args: argparse.Namespace | None = None) -> Network:
    """The network of a checkpoint, or one of random weights from a YAML file.

    model: the kind that is wanted, None for either. args: where flags describe the network. Raises InputError for
    files that are neither.
    """
    from common.config import build_config
    from models.loading import Network, build_network, load_network, stated_settings

    flags = {} if args is None else {**task_settings(args), **architecture(args)}
    config_path = args and args.config_path
    if path.suffix not in (".yaml", ".yml"):
        return load_network(path, stated_settings(config_path, flags), model=model)
    if config_path:
        raise InputError(f"--config_path {config_path}: {path} describes its network already; give one of them")
    settings = stated_settings(path, flags)
    settings.setdefault("model", "deediff_uvit" if settings.get("classifier_type") else "uvit")
    config = build_config(settings, str(path))
    if model not in (None, config.model):
        raise InputError(f"{path} describes a {config.model}, wanted a {model}")
    return Network(build_network(config).requires_grad_(False).eval(), config, "random", None, path)


def copy_of(network: Network, device: torch.device) -> Network:
    """One to be measured, which changes its weights: into a precision, or by training."""
    return network._replace(module=copy.deepcopy(network.module).to(device))


if __name__ == "__main__":
    main()
