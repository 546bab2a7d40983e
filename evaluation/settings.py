"""The settings of fid.py, and those of compare.py about images. No torch in here."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

from common.errors import InputError
from common.options import MOST_BATCH, MachineSettings
from common.settings import Checked, option, section
from data import CROPS, DATASETS

METRICS = ("fid", "kid", "is", "prc")
KID_SUBSET_SIZE, KID_SUBSETS = 1000, 100
INCEPTION, EFFICIENTNET = EXTRACTORS = ("inception", "efficientnet-lite0")


def metrics(text: str) -> tuple[str, ...]:
    """An argparse type: comma-separated METRICS, each once."""
    chosen = tuple(dict.fromkeys(text.split(",")))
    if unknown := [name for name in chosen if name not in METRICS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(METRICS)}")
    return chosen


@dataclass(frozen=True, kw_only=True)
class ReferenceSettings(Checked):
    """The real images."""

    dataset: str | None = option(None, "dataset whose whole training set is the reference", choices=tuple(DATASETS))
    data_path: Path | None = option(None, "path of the dataset (default: datasets/)", exists="path")
    crop: str | None = option(None, "crop of the dataset (default: the crop of the samples' network)", choices=CROPS)
    download: bool = option(False, "download the dataset first, if it is missing")
    reference: Path | None = option(
        None,
        "folder of images to score against, or an .npz with mu and sigma, or with images in arr_0",
        exists="path",
    )
    n_reference: int | None = option(
        None,
        "number of real images, evenly spaced; broken ones are skipped (default: all)",
        least=2,
        most=10_000_000,
    )
    cache_dir: Path | None = option(None, "folder for cached statistics of datasets (default: ~/.cache/duodiff)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dataset and self.reference:
            raise InputError("--dataset and --reference both choose the real images; give one of them")
        for name in ("data_path", "crop", "download"):
            if getattr(self, name) and not self.dataset:
                raise InputError(f"--{name} needs --dataset")
        if self.dataset and self.cache_dir is None:
            object.__setattr__(self, "cache_dir", default_cache())


@dataclass(frozen=True, kw_only=True)
class ScoringSettings(Checked):
    """Settings of fid.py."""

    samples_path: Path = option(
        help="folder of images from sampler.py (the scores go to its report/), or an .npz with arr_0, uint8 (N, H, W, "
        "3) (the scores go to <name>_report/ in the same folder)",
        exists="path",
    )
    real: ReferenceSettings = section("real images", ReferenceSettings())
    metrics: tuple[str, ...] = option(
        ("fid",), "scores to compute, separated by commas", parse=metrics, metavar="fid,kid,is,prc"
    )
    feature_extractor: str = option(
        INCEPTION,
        "inception, as in published scores; efficientnet-lite0, which needs no download (requirements-eval.txt); or a "
        "TorchScript file that maps uint8 (N, C, H, W) to features (N, D)",
    )
    feature_extractor_weights: Path | None = option(
        None,
        "weights of inception (default: downloaded once) or efficientnet-lite0 (default: of the installed package)",
        exists="file",
    )
    save_stats: Path | None = option(None, "write mu and sigma of the samples to this .npz, which --reference reads")
    batch_size: int = option(64, "number of images per call of the feature extractor", least=1, most=MOST_BATCH)
    machine: MachineSettings = section("machine", MachineSettings())

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.samples_path.is_dir() and self.samples_path.suffix != ".npz":
            raise InputError(f"--samples_path {self.samples_path}: wanted a folder of images, or an .npz")
        if self.save_stats is not None:
            self._check_save_stats(self.save_stats)
        elif not (self.real.dataset or self.real.reference):
            raise InputError("give --dataset or --reference to score against")
        check_extractor(self.feature_extractor, self.feature_extractor_weights)
        if "is" in self.metrics and self.feature_extractor != INCEPTION:
            raise InputError("--metrics is: the Inception score needs --feature_extractor inception")

    def _check_save_stats(self, path: Path) -> None:
        if path.is_dir():
            raise InputError(f"--save_stats {path}: is a folder; name a file, such as {path / 'stats.npz'}")
        for name, read in (("samples_path", self.samples_path), ("reference", self.real.reference)):
            if path.exists() and read is not None and read.samefile(path):
                raise InputError(f"--save_stats {path}: would replace --{name}; name another file")


@dataclass(frozen=True, kw_only=True)
class PairSettings(Checked):
    """Settings of compare.py about images of the same noise."""

    pair_with: str | None = option(
        None, "label whose images the other runs are compared with (default: the first label)"
    )
    n_pairs: int = option(1000, "number of images of each run to compare, from index 0 on", least=1, most=10_000_000)
    feature_extractor: str | None = option(
        None, "also measure a distance in the features of this extractor (see fid.py)"
    )
    feature_extractor_weights: Path | None = option(
        None, "weights of inception or efficientnet-lite0 (see fid.py)", exists="file"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_extractor(self.feature_extractor, self.feature_extractor_weights)


def check_extractor(name: str | None, weights: Path | None) -> None:
    """Raises InputError for a missing file, and for weights that belong to no named extractor."""
    known = " or ".join(EXTRACTORS)
    if name not in (None, *EXTRACTORS) and not Path(name).is_file():
        raise InputError(f"--feature_extractor {name}: no such file (or give {known})")
    if weights and name not in EXTRACTORS:
        raise InputError(f"--feature_extractor_weights belongs to --feature_extractor {known}")


def default_cache() -> Path:
    """Raises InputError for a user without a home folder."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "duodiff"
    except RuntimeError:  # HOME is not set, and the user has no entry that names one
        raise InputError("there is no home folder for the statistics of the dataset; give --cache_dir") from None
