"""Compare scored runs, with one or several seeds each: a table, and a picture of score against time."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.cli import Parser
from common.errors import InputError, command
from common.files import writable_folder, write_json
from common.settings import Checked, option
from common.tables import on_terminal
from evaluation.comparison import check_comparable, notes_on, numbers, read_run, summarised, table


def labelled(text: str) -> tuple[str, Path]:
    label, _, folder = text.rpartition("=")
    if not label or not folder:
        raise argparse.ArgumentTypeError(f"{text!r}: wanted LABEL=FOLDER")
    if not Path(folder).is_dir():
        raise argparse.ArgumentTypeError(f"{folder}: no such folder")
    return label, Path(folder)


@dataclass(frozen=True, kw_only=True)
class CompareSettings(Checked):
    """Settings of compare.py."""

    runs: tuple[Any, ...] = option(
        help="folder of scored samples; the first label is the baseline; repeat a label for several seeds",
        parse=labelled,
        positional=True,
        metavar="LABEL=FOLDER",
    )
    metric: str = option("fid", "name of the score in report/metrics.json")
    output: Path = option(Path("comparison.png"), "file of the picture")
    json: Path | None = option(None, "also write all numbers to this JSON file")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.output.suffix.lower() not in (".png", ".pdf", ".svg"):
            raise InputError(f"--output {self.output}: wanted a .png, .pdf or .svg")


def parse_settings(argv: Sequence[str] | CompareSettings | None) -> CompareSettings:
    return Parser(description=__doc__).settings(CompareSettings, argv, network=False)


@command
def main(argv: Sequence[str] | CompareSettings | None = None) -> None:
    settings = parse_settings(argv)
    metric = settings.metric
    runs = [read_run(label, folder, metric) for label, folder in settings.runs]
    check_comparable(runs)
    summaries, notes = summarised(runs), notes_on(runs)
    for path in (settings.output, settings.json):
        if path is not None:
            writable_folder(path.parent)
    print("\n".join([table(summaries, metric), *map(on_terminal, notes)]))

    from evaluation.picture import draw

    draw(settings.output, summaries, metric)
    print(f"picture: {settings.output}")
    if settings.json:
        write_json(settings.json, numbers(summaries, metric) | {"notes": notes})
        print(f"numbers: {settings.json}")


if __name__ == "__main__":
    main()
