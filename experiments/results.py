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
from dataclasses import dataclass, fields
from pathlib import Path

from common.cli import Parser
from common.errors import InputError, command
from common.files import writable_folder
from common.options import MOST_SEED
from common.progress import duration
from common.settings import Checked, option
from experiments.runner import Runner, words_of
from experiments.sets import colour, digits, fetched_emoji


@dataclass(frozen=True, kw_only=True)
class ResultsSettings(Checked):
    """Settings of results.py."""

    folder: Path | None = option(
        None,
        "folder of colour images, with a sub-folder for each class (default: emoji, fetched with npm)",
        positional=True,
        metavar="FOLDER",
    )
    sets: tuple[str, ...] = option(("digits", "colour"), "sets of images to measure on", choices=("digits", "colour"))
    seeds: tuple[int, ...] = option((0, 1, 2), "at least two seeds of networks and samples", least=0, most=MOST_SEED)
    quick: bool = option(
        False, "do little of everything, to check that it works; all files, the page among them, go to results/quick"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.folder and "colour" not in self.sets:
            raise InputError(f"{self.folder}: colour images belong to --sets colour")
        if len(self.seeds) < 2 or len(set(self.seeds)) < len(self.seeds):
            raise InputError("--seeds: give two or more that differ, for there are intervals over them")

    @property
    def words(self) -> list[str]:
        """The command line that has these settings."""
        changed = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        folder = changed.pop("folder", None)
        return words_of([folder] if folder else [], changed)


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
    how = f"`{shlex.join(['bash', 'scripts/results.sh', *settings.words])}` in {run.seconds_in_all / 60:.0f} minutes"
    remarks = write_page(page, measured, how, describe_machine(pick_device("auto")), quick=settings.quick)
    print("\n".join(["", *remarks]))
    print(f"-> {page}; it took {duration(run.seconds_in_all)} in all")


if __name__ == "__main__":
    main()
