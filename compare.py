"""Compare scored runs, with one or several seeds each: a table, a picture of score against time, and a web page."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.cli import Parser
from common.errors import InputError, command
from common.files import writable_folder, write_json
from common.options import MachineSettings
from common.settings import Checked, option, section
from common.tables import on_terminal
from evaluation.comparison import check_comparable, notes_on, numbers, read_run, summarised, table
from evaluation.settings import PairSettings


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
    html: Path | None = option(None, "also write a web page with the samples of all runs side by side")
    html_samples: int = option(
        48, "number of samples on that page; fewer if their images are too large", least=1, most=10_000
    )
    pairs: PairSettings = section("images of the same noise", PairSettings())
    machine: MachineSettings = section("machine", MachineSettings())

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.output.suffix.lower() not in (".png", ".pdf", ".svg"):
            raise InputError(f"--output {self.output}: wanted a .png, .pdf or .svg")
        if self.html and self.html.suffix.lower() not in (".html", ".htm"):
            raise InputError(f"--html {self.html}: wanted a .html")
        labels = {label for label, _ in self.runs}
        if self.pair_with not in labels:
            raise InputError(f"--pair_with {self.pair_with}: no run has this label")

    @property
    def pair_with(self) -> str:
        """The label whose images the others are compared with."""
        first: str = self.runs[0][0]
        return self.pairs.pair_with or first


def parse_settings(argv: Sequence[str] | CompareSettings | None) -> CompareSettings:
    return Parser(description=__doc__).settings(CompareSettings, argv, network=False)


@command
def main(argv: Sequence[str] | CompareSettings | None = None) -> None:
    settings = parse_settings(argv)
    metric, pairs = settings.metric, settings.pairs
    runs = [read_run(label, folder, metric) for label, folder in settings.runs]
    check_comparable(runs)
    summaries, notes = summarised(runs), notes_on(runs)
    for path in (settings.output, settings.json, settings.html):
        if path is not None:
            writable_folder(path.parent)

    from common.devices import pick_device
    from evaluation.features import load_extractor
    from evaluation.pairs import with_pairs
    from evaluation.picture import draw
    from evaluation.strips import read_strip
    from evaluation.webpage import write_page

    strips = [read_strip(summary.runs[0]) for summary in summaries] if settings.html else []
    extractor = None
    if pairs.feature_extractor:
        device = pick_device(settings.machine.device)
        extractor = load_extractor(pairs.feature_extractor, pairs.feature_extractor_weights, device)
    summaries = with_pairs(summaries, settings.pair_with, pairs.n_pairs, extractor, settings.machine.quiet)
    print("\n".join([table(summaries, metric), *map(on_terminal, notes)]))

    draw(settings.output, summaries, metric)
    print(f"picture: {settings.output}")
    if settings.json:
        features = extractor and extractor.describe()
        write_json(settings.json, numbers(summaries, metric) | {"pair_features": features, "notes": notes})
        print(f"numbers: {settings.json}")
    if settings.html:
        write_page(settings.html, summaries, strips, metric, notes, settings.pair_with, settings.html_samples)
        print(f"page: {settings.html}")


if __name__ == "__main__":
    main()
