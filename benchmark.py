"""Measure how fast sampling, early exit and training are on this machine, beside what their FLOPs promise."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarking.settings import BenchmarkSettings, ExitBenchmark, SamplingBenchmark, TrainingBenchmark
from common.cli import Parser
from common.errors import InputError, command
from common.settings import add_options, flat, from_flags

if TYPE_CHECKING:
    import torch

    from models.loading import Network

SETTINGS: dict[str, type[BenchmarkSettings]] = {
    "sample": SamplingBenchmark,
    "early-exit": ExitBenchmark,
    "train": TrainingBenchmark,
}


def parse_settings(argv: Sequence[str] | None) -> tuple[str, BenchmarkSettings]:
    """The sub-command and its settings."""
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{sample,early-exit,train}")
    for name, cls in SETTINGS.items():
        add_options(commands.add_parser(name, help=cls.__doc__, description=cls.__doc__), cls)
    given = vars(parser.parse_args(argv))
    name = given["command"]
    return name, from_flags(SETTINGS[name], given)


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
    from models.loading import check_pair

    full, shallow = open_network(settings.full, "uvit"), open_network(settings.shallow, "uvit")
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

    network = open_network(settings.model, "deediff_uvit")

    def measure(precision: str) -> dict[str, Any]:
        return measure_early_exit(settings, copy_of(network, device), precision, device)

    return measure, early_exit_table


def prepare_training(settings: TrainingBenchmark, device: torch.device) -> tuple[Measurement, ToText]:
    from benchmarking.report import training_table
    from benchmarking.training import measure_training

    network = open_network(settings.model)
    if network.config.model == "uvit" and settings.freeze_backbone:
        raise InputError(f"--freeze_backbone is for early-exit models; {settings.model} is a backbone")

    def measure(precision: str) -> dict[str, Any]:
        return measure_training(settings, copy_of(network, device), precision, device)

    return measure, training_table


COMMANDS = {"sample": prepare_sampling, "early-exit": prepare_early_exit, "train": prepare_training}


def open_network(path: Path, model: str | None = None) -> Network:
    """The network of a checkpoint, or one of random weights from a YAML file.

    model: the kind that is wanted, None for either. Raises InputError for files that are neither.
    """
    from common.config import build_config, read_yaml
    from models.loading import Network, build_network, load_network

    if path.suffix not in (".yaml", ".yml"):
        return load_network(path, {}, model=model)
    stated = read_yaml(path)
    stated.setdefault("model", "deediff_uvit" if stated.get("classifier_type") else "uvit")
    config = build_config(stated, str(path))
    if model not in (None, config.model):
        raise InputError(f"{path} describes a {config.model}, wanted a {model}")
    return Network(build_network(config).requires_grad_(False).eval(), config, "random", None, path)


def copy_of(network: Network, device: torch.device) -> Network:
    """One to be measured, which changes its weights: into a precision, or by training."""
    return network._replace(module=copy.deepcopy(network.module).to(device))


if __name__ == "__main__":
    main()
