"""What samples are scored against: a dataset, a folder, or published statistics."""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from tqdm import tqdm

from common.distributed import is_main, on_main, share
from common.errors import InputError, WriteError
from common.files import writable_folder
from data import open_dataset
from data.dataset import ImageDataset
from evaluation.features import FeatureExtractor, extract
from evaluation.images import FinishedImages
from evaluation.samples import Samples
from evaluation.statistics import Statistics, load_statistics, save_statistics, statistics_of

log = logging.getLogger(__name__)


class Reference:
    """Real images, or the statistics of some."""

    def __init__(self, about: dict[str, Any]):
        self.about = about  # provenance, as plain values

    def statistics(self, extractor: FeatureExtractor, batch_size: int, quiet: bool) -> Statistics | None:
        """On process 0; None on the others."""
        return statistics_of(f for f, _ in extract(extractor, self.batches(batch_size, quiet)))

    def batches(self, batch_size: int, quiet: bool) -> Iterator[Tensor]:
        """This process's share, uint8 (B, C, H, W)."""
        raise NotImplementedError


class StatisticsFile(Reference):
    def __init__(self, path: Path):
        self.content = load_statistics(path)
        super().__init__({"reference": str(path), "n_reference": self.content.n})

    def statistics(self, extractor: FeatureExtractor, batch_size: int, quiet: bool) -> Statistics | None:
        return self.content


class DatasetReference(Reference):
    """The training set under the training transform, without flips; its statistics are cached."""

    def __init__(self, dataset: ImageDataset, n: int | None, cache_dir: Path):
        if n is not None and n > len(dataset):
            raise InputError(f"--n_reference {n}: the dataset has {len(dataset)} images")
        self.indices = np.linspace(0, len(dataset) - 1, n or len(dataset)).round().astype(int).tolist()
        self.dataset, self.cache_dir = dataset, cache_dir
        super().__init__(dataset.describe() | {"n_reference": len(self.indices)})

    def batches(self, batch_size: int, quiet: bool) -> Iterator[Tensor]:
        starts = share(range(0, len(self.indices), batch_size))
        for start in tqdm(starts, desc="real images", unit="batch", disable=True if quiet else None):
            yield self.dataset.__getitems__(self.indices[start : start + batch_size])[0]

    def statistics(self, extractor: FeatureExtractor, batch_size: int, quiet: bool) -> Statistics | None:
        key = json.dumps([self.about, extractor.describe()], sort_keys=True)
        digest = hashlib.sha256(key.encode()).hexdigest()[:16]
        name = f"{self.about['dataset']}_{len(self.indices)}_{extractor.name}_{digest}.npz"
        path = writable_folder(self.cache_dir) / name
        known = _cached(path) if is_main() else None
        if on_main(lambda: known is not None):
            return known
        statistics = super().statistics(extractor, batch_size, quiet)
        if statistics is not None:
            try:
                save_statistics(path, statistics)
            except WriteError as error:  # the score is not lost for that
                log.warning("%s; the next run will compute them again", error)
        return statistics


def _cached(path: Path) -> Statistics | None:
    if path.exists():
        try:
            return load_statistics(path)
        except InputError as error:
            log.warning("computing again: %s", error)
    return None


class FolderReference(Reference):
    def __init__(self, images: FinishedImages, n: int | None):
        if n is not None and n > len(images):
            raise InputError(f"--n_reference {n}: {images.folder} has {len(images)} images")
        if n is not None:
            images.files = [images.files[i] for i in np.linspace(0, len(images) - 1, n).round().astype(int)]
        self.images = images
        super().__init__({"reference": str(images.folder), "n_reference": len(images)})

    def batches(self, batch_size: int, quiet: bool) -> Iterator[Tensor]:
        yield from tqdm(
            self.images.batches(batch_size), desc="real images", unit="batch", disable=True if quiet else None
        )


def open_reference(args: argparse.Namespace, scored: Samples) -> Reference:
    """args: what fid.py parsed. Raises InputError where reference and samples are not of one kind."""
    samples = scored.images
    width, height = samples.size
    if args.dataset:
        if width != height:
            raise InputError(f"{samples.folder} holds images of {width} x {height}, datasets give squares")
        crop = args.crop or (scored.crop if scored.dataset == args.dataset else None)
        dataset = open_dataset(
            args.dataset, args.data_path, img_size=width, in_chans=samples.in_chans, crop=crop, download=args.download
        )
        return DatasetReference(dataset, args.n_reference, args.cache_dir)
    if args.reference.is_file():
        return StatisticsFile(args.reference)
    images = FinishedImages(args.reference)
    if (images.size, images.in_chans) != (samples.size, samples.in_chans):
        raise InputError(
            f"{images.folder} holds images of {images.size[0]} x {images.size[1]} ({images.in_chans} channels), "
            f"{samples.folder} of {width} x {height} ({samples.in_chans}): sizes must be equal; for other real "
            "images use --dataset folder --data_path, which resizes and crops as training does"
        )
    return FolderReference(images, args.n_reference)
