"""Measure ways to save work with the networks of pretrained/, in samplers of many and of few steps.

It writes its part of docs/results.md. It calls the project's scripts, prints each call as a command, and continues
where it was stopped; its files lie in results/garments/.
"""

from __future__ import annotations

if __name__ == "__main__":
    from common.startup import end_in_one_line

    end_in_one_line()  # on a signal during the imports below

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.cli import Parser
from common.errors import command
from common.files import writable_folder
from common.options import MOST_SEED
from common.settings import option
from experiments.runner import Runner
from experiments.settings import MeasurementSettings

SAMPLERS = {
    "DDPM, 50 steps": ("ddpm", 50),
    "DDPM, 250 steps": ("ddpm", 250),
    "DDIM, 50 steps": ("ddim", 50),
    "DPM-Solver++, 20 steps": ("dpmsolver++", 20),
    "DPM-Solver++, 10 steps": ("dpmsolver++", 10),
}
NAMES = {f"{solver}-{steps}": name for name, (solver, steps) in SAMPLERS.items()}


@dataclass(frozen=True, kw_only=True)
class GarmentsSettings(MeasurementSettings):
    """Settings of garments.py."""

    samplers: tuple[str, ...] = option(tuple(NAMES), "solvers, each with its number of steps", choices=tuple(NAMES))
    seeds: tuple[int, ...] = option((1, 2, 3), "at least two seeds of samples", least=0, most=MOST_SEED)
    n_samples: int = option(1000, "images of each seed", least=20, most=100_000)
    data_path: Path | None = option(None, "path of Fashion-MNIST (default: datasets/)", exists="path")


def parse_settings(argv: Sequence[str] | GarmentsSettings | None) -> GarmentsSettings:
    parser = Parser(prog="garments.py", description=__doc__.partition("\n")[0])
    return parser.settings(GarmentsSettings, argv, network=False)


@command
def main(argv: Sequence[str] | GarmentsSettings | None = None) -> None:
    settings = parse_settings(argv)
    work = writable_folder(Path("results/garments/quick" if settings.quick else "results/garments"))

    from benchmarking.measure import describe_machine
    from common.devices import pick_device
    from experiments.garments_measure import Garments
    from experiments.garments_page import write_page

    run = Runner(work)
    of_samplers = {NAMES[name]: SAMPLERS[NAMES[name]] for name in settings.samplers}
    n_samples = 20 if settings.quick else settings.n_samples
    n_paths = 8 if settings.quick else 64
    garments = Garments(work, run, settings.data_path, settings.seeds, n_samples, n_paths)
    measured = garments.measure(of_samplers)
    page = (work if settings.quick else writable_folder(Path("docs"))) / "results.md"
    how = f"`{shlex.join(['python', '-m', 'experiments.garments', *settings.words('data_path')])}`"
    how += f" in {run.seconds_in_all / 60:.0f} minutes of sampling and calibration"
    write_page(page, measured, how, describe_machine(pick_device("auto")), quick=settings.quick)
    print(f"-> {page}")


if __name__ == "__main__":
    main()
