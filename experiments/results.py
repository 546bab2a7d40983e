"""Measure DuoDiff and what one would do instead, on digits and on small colour images, and write docs/results.md.

It calls the project's scripts and prints each call as a command. A run that was stopped goes on where it was when it
is given again; what it makes lies in results/, which may be removed to begin anew.
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
from common.errors import InputError, command
from common.files import writable_folder
from common.progress import duration
from common.settings import option
from experiments.runner import Runner
from experiments.sets import colour, digits, fetched_emoji
from experiments.settings import MeasurementSettings


@dataclass(frozen=True, kw_only=True)
class ResultsSettings(MeasurementSettings):
    """Settings of results.py."""

    folder: Path | None = option(
        None,
        "folder of colour images, with a sub-folder for each class (default: emoji, fetched with npm)",
        positional=True,
        metavar="FOLDER",
    )
    sets: tuple[str, ...] = option(("digits", "colour"), "sets of images to measure on", choices=("digits", "colour"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.folder and "colour" not in self.sets:
            raise InputError(f"{self.folder}: colour images belong to --sets colour")


def parse_settings(argv: Sequence[str] | ResultsSettings | None) -> ResultsSettings:
    parser = Parser(prog="results.py", description=__doc__.partition("\n")[0])
    return parser.settings(ResultsSettings, argv, network=False)


@command
def main(argv: Sequence[str] | ResultsSettings | None = None) -> None:
    settings = parse_settings(argv)
    work = writable_folder(Path("results/quick" if settings.quick else "results"))
    sets = []
    if "digits" in settings.sets:
        sets.append(digits())
    if "colour" in settings.sets:
        sets.append(colour(work, settings.folder or fetched_emoji(Path("results")), is_emoji=settings.folder is None))
    if settings.quick:
        sets = [images.quick() for images in sets]

    from benchmarking.measure import describe_machine
    from common.devices import pick_device
    from experiments.measure import Experiment
    from experiments.page import write_page

    run = Runner(work)
    measured = [Experiment(images, work / images.folder, run, settings.seeds).measure() for images in sets]
    page = (work if settings.quick else writable_folder(Path("docs"))) / "results.md"
    command_line = ["bash", "scripts/results.sh", *settings.words("folder")]
    command_line += [str(settings.folder)] if settings.folder else []
    how = f"`{shlex.join(command_line)}` in {run.seconds_in_all / 60:.0f} minutes"
    remarks = write_page(page, measured, how, describe_machine(pick_device("auto")), quick=settings.quick)
    print("\n".join(["", *remarks]))
    print(f"-> {page}; it took {duration(run.seconds_in_all)} in all")


if __name__ == "__main__":
    main()
