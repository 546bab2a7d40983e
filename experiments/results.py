"""Measure ways to save work on garments, digits and small colour images, and write docs/results.md.

It calls the project's scripts and prints each call as a command. A run that was stopped goes on where it was when it
is given again; what it makes lies in results/, which may be removed to begin anew.
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
from common.errors import InputError, command
from common.files import writable_folder
from common.options import MOST_SEED
from common.settings import Checked, option
from experiments.runner import Runner
from experiments.sets import (
    FLUENT,
    GOOGLE,
    NAMES,
    ImageSet,
    TrainedSet,
    check_same,
    colour,
    digits,
    fetched_emoji,
    garments,
    quick,
)
from experiments.settings import check_seeds, words

SETS = ("garments", "digits", "colour")


@dataclass(frozen=True, kw_only=True)
class ResultsSettings(Checked):
    """Settings of results.py."""

    folder: Path | None = option(
        None,
        "folder of colour images, with a sub-folder for each class if they have classes (default: emoji, fetched with "
        "npm)",
        positional=True,
        metavar="FOLDER",
    )
    sets: tuple[str, ...] = option(SETS, "sets of images to measure on", choices=SETS)
    data_path: Path | None = option(None, "path of Fashion-MNIST (default: datasets/)", exists="path")
    download: bool = option(False, "download Fashion-MNIST if it is missing")
    precision: str | None = option(
        None, "of training, calibration and sampling (default: that of each set)", choices=("fp32", "bf16")
    )
    samplers: tuple[str, ...] | None = option(
        None,
        "solvers, each with its number of steps, besides ddpm-50 (default: those of each set)",
        choices=tuple(NAMES),
    )
    seeds: tuple[int, ...] | None = option(
        None, "two or more seeds of networks and samples (default: those of each set)", least=0, most=MOST_SEED
    )
    n_samples: int | None = option(None, "images of each seed (default: that of each set)", least=20, most=10_000)
    quick: bool = option(
        False, "make a short run that checks all parts; all files, also the page, go to a folder quick/ in results/"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.folder and "colour" not in self.sets:
            raise InputError(f"{self.folder}: colour images belong to --sets colour")
        if self.seeds is not None:
            check_seeds(self.seeds)


def parse_settings(argv: Sequence[str] | ResultsSettings | None) -> ResultsSettings:
    parser = Parser(prog="results.py", description=__doc__.partition("\n")[0])
    return parser.settings(ResultsSettings, argv, network=False)


def sets_of(settings: ResultsSettings) -> list[ImageSet]:
    """Raises InputError where images are missing."""
    from data import open_dataset

    sets: list[ImageSet] = []
    if "garments" in settings.sets:
        sets.append(garments(settings.data_path))
        open_dataset("fashion_mnist", settings.data_path, img_size=28, in_chans=1, download=settings.download)
    if "digits" in settings.sets:
        sets.append(digits())
    if "colour" in settings.sets:
        folder = settings.folder or fetched_emoji(Path("results"), GOOGLE, FLUENT)
        sets.append(colour(folder, is_emoji=settings.folder is None))
    given: dict[str, Any] = {name: getattr(settings, name) for name in ("precision", "samplers", "seeds", "n_samples")}
    given = {name: value for name, value in given.items() if value is not None}
    return [replace(quick(images) if settings.quick else images, **given) for images in sets]


@command
def main(argv: Sequence[str] | ResultsSettings | None = None) -> None:
    settings = parse_settings(argv)
    work = writable_folder(Path("results/quick" if settings.quick else "results"))
    page = writable_folder(work if settings.quick else Path("docs")) / "results.md"
    sets = sets_of(settings)

    from benchmarking.measure import describe_machine
    from common.devices import pick_device
    from evaluation.features import load_extractor
    from evaluation.settings import EFFICIENTNET
    from experiments.measure import Experiment
    from experiments.networks import Networks, Pretrained, Trained
    from experiments.results_page import write_page

    extractor, measured = load_extractor(EFFICIENTNET, None, pick_device("auto")), []
    for images in sets:
        folder = writable_folder(work / images.name)
        check_same(folder, images)
    for images in sets:
        folder = work / images.name
        run = Runner(folder)
        networks: Networks = Pretrained(images.data)
        if isinstance(images, TrainedSet):
            networks = Trained(images, folder, run)
        of_set = Experiment(images, networks, extractor, folder, run).measure()
        measured.append({**of_set, "hours": run.seconds_in_all / 3600})
    line = ["bash", "scripts/results.sh", *words(settings, "folder", "data_path", "download")]
    how = f"`{shlex.join([*line, *([str(settings.folder)] if settings.folder else [])])}`"
    remarks = write_page(page, measured, how, describe_machine(pick_device("auto")), quick=settings.quick)
    print("\n".join(["", *remarks]))
    print(f"-> {page}; it took {sum(of_set['hours'] for of_set in measured):.1f} hours in all")


if __name__ == "__main__":
    main()
