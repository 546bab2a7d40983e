"""Measure the speed of sampling, early exit and training on this machine, and compare it with their FLOPs."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from benchmarking.settings import BenchmarkSettings, ExitBenchmark, SamplingBenchmark, TrainingBenchmark
from common.cli import Parser
from common.config import Config
from common.errors import InputError, command
from common.settings import add_options, flat, from_flags, given_of

if TYPE_CHECKING:
    import torch
    from torch import nn

    from models.loading import Network

M = TypeVar("M", bound="nn.Module")
SETTINGS: dict[str, type[BenchmarkSettings]] = {
    "sample": SamplingBenchmark,
    "early-exit": ExitBenchmark,
    "train": TrainingBenchmark,
}


class PrintEnvironment(argparse.Action):
    """An action like --version: print, then end."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from benchmarking.environment import environment

        print(environment())
        parser.exit()


def parse_settings(argv: Sequence[str] | None) -> tuple[str, BenchmarkSettings]:
    """The sub-command and its settings."""
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--environment", action=PrintEnvironment, nargs=0, help="print versions, CPU and GPU, for a bug report"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{sample,early-exit,train}")
    for name, cls in SETTINGS.items():
        sub = commands.add_parser(name, help=cls.__doc__, description=cls.__doc__)
        add_options(sub, cls)
        add_options(sub, Config, partial=True)
    given = vars(parser.parse_args(argv))
    name = given["command"]
    return name, from_flags(SETTINGS[name], given, described=given_of(Config, given))


@command
def main(argv: Sequence[str] | None = None) -> None:
    name, settings = parse_settings(argv)

    from benchmarking.measure import describe_machine
    from benchmarking.report import draw
    from common.devices import check_compiler, pick_device, pick_precision
    from common.files import read_json, writable_folder, write_json

    device = pick_device(settings.machine.device)
    precisions = [pick_precision(wanted, device) for wanted in settings.precision or [None]]
    if settings.compile:
        check_compiler(device)
    folder = writable_folder(settings.output_folder)
    measure, to_text = COMMANDS[name](settings, device)

    machine = describe_machine(device)
    print(", ".join(f"{key}: {value}" for key, value in machine.items()), end="\n\n")
    measured = []
    for precision in precisions:
        measured.append(measure(precision))
        print(to_text(measured[-1]))
    write_json(folder / f"{name}.json", {"machine": machine, "settings": flat(settings), "measured": measured})

    there = {name: folder / f"{name}.json" for name in COMMANDS}
    draw(folder / "benchmark.png", {name: read_json(path) for name, path in there.items() if path.exists()})
    print(f"-> {folder}")


Measurement = Callable[[str], dict[str, Any]]  # by precision
ToText = Callable[[dict[str, Any]], str]


def prepare_sampling(settings: SamplingBenchmark, device: torch.device) -> tuple[Measurement, ToText]:
    from benchmarking.report import sampling_tables
    from benchmarking.sampling import measure_sampling
    from diffusion import NoiseSchedule
    from diffusion.solvers import make_solver, spaced_timesteps
    from models.backbone import Backbone
    from models.loading import check_pair

    full, shallow = open_network(settings.full, Backbone, settings), open_network(settings.shallow, Backbone)
    check_pair(shallow, full)
    config = full.config
    num_timesteps = config.diffusion_params.num_timesteps
    if (highest := max(settings.t_switch)) >= num_timesteps:
        raise InputError(f"--t_switch {highest} is out of range, wanted -1..{num_timesteps - 1}")
    spaced_timesteps(num_timesteps, settings.steps)
    for solver in settings.solver:
        make_solver(solver, NoiseSchedule(**config.diffusion_params.schedule), config.parametrization)

    def measure(precision: str) -> dict[str, Any]:
        return measure_sampling(settings, copy_of(full, device), copy_of(shallow, device), precision, device)

    return measure, sampling_tables


def prepare_early_exit(settings: ExitBenchmark, device: torch.device) -> tuple[Measurement, ToText]:
    from benchmarking.early_exit import measure_early_exit
    from benchmarking.report import early_exit_table
    from models.early_exit import EarlyExitUViT

    network = open_network(settings.model, EarlyExitUViT, settings)

    def measure(precision: str) -> dict[str, Any]:
        return measure_early_exit(settings, copy_of(network, device), precision, device)

    return measure, early_exit_table


def prepare_training(settings: TrainingBenchmark, device: torch.device) -> tuple[Measurement, ToText]:
    from torch import nn

    from benchmarking.report import training_table
    from benchmarking.training import measure_training

    network = open_network(settings.model, nn.Module, settings)
    if network.config.model != "deediff_uvit" and settings.freeze_backbone:
        raise InputError(f"--freeze_backbone is for early-exit models; {settings.model} is a backbone")

    def measure(precision: str) -> dict[str, Any]:
        return measure_training(settings, copy_of(network, device), precision, device)

    return measure, training_table


Prepare = Callable[[Any, "torch.device"], tuple[Measurement, ToText]]  # each takes its own settings class
COMMANDS: dict[str, Prepare] = {"sample": prepare_sampling, "early-exit": prepare_early_exit, "train": prepare_training}


def open_network(path: Path, kind: type[M], settings: BenchmarkSettings | None = None) -> Network[M]:
    """The network of a checkpoint, or one of random weights from a YAML file.

    kind: the required class, nn.Module for any. settings: the flags that describe the network, if any. Raises
    InputError for other files.
    """
    from common.config import build_config
    from diffusion.schedulers import process_of
    from models.loading import Network, build_network, load_network, name_of, stated_settings

    flags, config_path = (settings.described, settings.config_path) if settings else ({}, None)
    if path.suffix not in (".yaml", ".yml"):
        return load_network(path, stated_settings(config_path, flags), kind, process_of=process_of)
    if config_path:
        raise InputError(f"--config_path {config_path}: {path} describes its network already; give one of them")
    stated = stated_settings(path, flags)
    stated.setdefault("model", "deediff_uvit" if stated.get("classifier_type") else "uvit")
    config = build_config(stated, str(path))
    network = build_network(config).requires_grad_(False).eval()
    if not isinstance(network, kind):
        raise InputError(f"{path} describes a {config.model}, wanted a {name_of(kind)}")
    return Network(network, config, "random", None, path)


def copy_of(network: Network[M], device: torch.device) -> Network[M]:
    """A copy on the device, because a measurement changes the weights (their precision, or by training)."""
    return replace(network, module=copy.deepcopy(network.module).to(device))


if __name__ == "__main__":
    main()
