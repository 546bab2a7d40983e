"""Measure plans of everything that networks can do against each mechanism alone, and write docs/plans.md.

Like results.py it calls the project's scripts, and goes on where it was stopped; what it makes lies in results/plans/.
"""

from __future__ import annotations

if __name__ == "__main__":
    from common.startup import end_in_one_line

    end_in_one_line()  # on a signal during the imports below

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.cli import Parser
from common.errors import command
from common.files import writable_folder
from common.settings import option
from evaluation.settings import EFFICIENTNET
from experiments.runner import Runner
from experiments.sets import ImageSet, colour, digits, fetched_emoji
from experiments.settings import MeasurementSettings


@dataclass(frozen=True, kw_only=True)
class PlansSettings(MeasurementSettings):
    """Settings of plans.py."""

    sets: tuple[str, ...] = option(("digits", "emoji"), "sets of images to measure on", choices=("digits", "emoji"))
    elsewhere: bool = option(True, "also use the plans in other samplers, and with networks of half the training")


def parse_settings(argv: Sequence[str] | PlansSettings | None) -> PlansSettings:
    parser = Parser(prog="plans.py", description=__doc__.partition("\n")[0])
    return parser.settings(PlansSettings, argv, network=False)


def images_of(name: str, work: Path) -> ImageSet:
    """A set, with less training and fewer paths than for docs/results.md."""
    if name == "digits":
        return replace(digits(), full_steps=2000, shallow_steps=1000, n_calibration=128)
    emoji = colour(work, fetched_emoji(Path("results")), is_emoji=True)
    few: dict[str, Any] = {"full_steps": 3000, "shallow_steps": 1000, "n_calibration": 128}
    return replace(emoji, **few, extractor=EFFICIENTNET, metric="kid")


@command
def main(argv: Sequence[str] | PlansSettings | None = None) -> None:
    settings = parse_settings(argv)
    work = writable_folder(Path("results/plans/quick" if settings.quick else "results/plans"))
    sets = [images_of(name, work) for name in settings.sets]
    if settings.quick:
        sets = [images.quick() for images in sets]

    from benchmarking.measure import describe_machine
    from common.devices import pick_device
    from experiments.plans_measure import Evidence
    from experiments.plans_page import write_page

    run = Runner(work)
    measured = [
        Evidence(images, work / images.folder, run, settings.seeds, settings.elsewhere).measure() for images in sets
    ]
    page = (work if settings.quick else writable_folder(Path("docs"))) / "plans.md"
    how = f"`{shlex.join(['python', '-m', 'experiments.plans', *settings.words()])}`"
    write_page(page, measured, how, describe_machine(pick_device("auto")), quick=settings.quick)
    print(f"-> {page}; its commands took {run.seconds_in_all / 60:.1f} minutes in all")


if __name__ == "__main__":
    main()
