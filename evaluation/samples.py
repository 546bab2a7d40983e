"""Samples to score, with the report of their run."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from common.distributed import shared_images
from common.errors import InputError
from common.files import read_json
from common.progress import counted
from evaluation.features import FeatureExtractor, extract
from evaluation.images import open_images
from evaluation.statistics import Statistics, statistics_of


class Samples:
    """A folder of samples or an .npz, and the report of the run.

    The report is in report/ in the folder, or in <name>_report/ next to an .npz. Raises InputError if the number of
    images differs from the report.
    """

    def __init__(self, path: Path):
        self.images = open_images(path)
        self.report = path / "report" if path.is_dir() else path.with_name(f"{path.stem}_report")
        about = self.report / "statistics.json"
        self.run: dict[str, Any] = read_json(about) if about.exists() else {}
        wanted = self.run.get("n_samples") if isinstance(self.run, dict) else ...
        if type(wanted) not in (int, type(None)) or not isinstance(self._network, dict):
            raise InputError(f"{about}: not in the format of sampler.py")
        if wanted is not None and wanted != len(self.images):
            raise InputError(
                f"{len(self.images):,} images in {path}, but its report counts {wanted:,}; sample again, or "
                f"remove {about} to score these images"
            )

    def batches(self, batch_size: int, quiet: bool) -> Iterable[Tensor]:
        """The share of this process, uint8 (B, C, H, W)."""
        total = shared_images(len(self.images), batch_size)
        return counted(self.images.batches(batch_size), "features of samples", total, quiet)

    def statistics(self, extractor: FeatureExtractor, batch_size: int, quiet: bool) -> Statistics | None:
        """The statistics of all samples on process 0; None on the others."""
        return statistics_of(f for f, _ in extract(extractor, self.batches(batch_size, quiet)))

    @property
    def dataset(self) -> str | None:
        """The training dataset of the network, if it is in the report."""
        return self._network.get("dataset")

    @property
    def crop(self) -> str | None:
        return self._network.get("crop")

    @property
    def _network(self) -> dict[str, Any]:
        backbones = self.run.get("backbones")
        return backbones[0] if isinstance(backbones, list) and backbones else {}
