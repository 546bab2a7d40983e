"""Measure plans of everything that networks can do against each mechanism alone, and write docs/plans.md.

Like results.py it calls the project's scripts, and goes on where it was stopped; what it makes lies in results/plans/.
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
from common.settings import Checked, option
from experiments.plans_sets import digits_for_plans, emoji_for_plans
from experiments.runner import Runner
from experiments.sets import quick
from experiments.settings import check_seeds, words

SETS = {"digits": digits_for_plans, "emoji": emoji_for_plans}


@dataclass(frozen=True, kw_only=True)
class PlansSettings(Checked):
    """Settings of plans.py."""

    seeds: tuple[int, ...] = option((0, 1, 2), "at least two seeds of networks and samples", least=0, most=MOST_SEED)
    sets: tuple[str, ...] = option(tuple(SETS), "sets of images to measure on", choices=tuple(SETS))
    elsewhere: bool = option(True, "also use the plans in other samplers, and with networks of half the training")
    quick: bool = option(
        False, "make a short run that checks all parts; all files, also the page, go to a folder quick/ in results/"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seeds(self.seeds)


def parse_settings(argv: Sequence[str] | PlansSettings | None) -> PlansSettings:
    parser = Parser(prog="plans.py", description=__doc__.partition("\n")[0])
    return parser.settings(PlansSettings, argv, network=False)


@command
def main(argv: Sequence[str] | PlansSettings | None = None) -> None:
    settings = parse_settings(argv)
    work = writable_folder(Path("results/plans/quick" if settings.quick else "results/plans"))
    sets = [SETS[name]() for name in settings.sets]
    if settings.quick:
        sets = list(map(quick, sets))

    from benchmarking.measure import describe_machine
    from common.devices import pick_device
    from experiments.plans_measure import Evidence
    from experiments.plans_page import write_page

    run = Runner(work)
    measured = [
        Evidence(images, work / images.name, run, settings.seeds, settings.elsewhere).measure() for images in sets
    ]
    page = (work if settings.quick else writable_folder(Path("docs"))) / "plans.md"
    how = f"`{shlex.join(['python', '-m', 'experiments.plans', *words(settings)])}`"
    write_page(page, measured, how, describe_machine(pick_device("auto")), quick=settings.quick)
    print(f"-> {page}; its commands took {run.seconds_in_all / 60:.1f} minutes in all")


if __name__ == "__main__":
    main()
