"""The real side of a score: a dataset, images, or published statistics."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from common.distributed import gather, is_main, on_main, share, shared_images
from common.errors import InputError, WriteError
from common.files import array_names, writable_folder
from common.progress import Progress, counted
from data import open_dataset
from data.dataset import ImageDataset, say_left_out
from evaluation.features import FeatureExtractor, extract
from evaluation.images import ARRAY, ManyImages, evenly_spaced, open_images
from evaluation.samples import Samples
from evaluation.settings import ReferenceSettings
from evaluation.statistics import Statistics, load_left_out, load_statistics, save_statistics, statistics_of

log = logging.getLogger(__name__)

OF_REAL = "features of real images"  # the title of a progress bar
READING = 3  # raise it when the same files give other pixels; cached statistics are then computed again


class Reference:
    """Real images, or their statistics."""

    def __init__(self, about: dict[str, Any]):
        self.about = about  # provenance, as plain values; complete after `account`

    def statistics(self, extractor: FeatureExtractor, batch_size: int, quiet: bool) -> Statistics | None:
        """The statistics on process 0; None on the others."""
        return statistics_of(f for f, _ in extract(extractor, self.batches(batch_size, quiet)))

    def batches(self, batch_size: int, quiet: bool) -> Iterator[Tensor]:
        """The share of this process, uint8 (B, C, H, W)."""
        raise NotImplementedError

    def account(self) -> None:
        """Warn about unreadable images and record them in `about`. All processes call it after reading."""


class FinishedReference(Reference):
    """All or n evenly spaced images of a folder or .npz."""

    def __init__(self, images: ManyImages, n: int | None):
        if n is not None:
            if n > len(images):
                raise InputError(f"--n_reference {n}: {images.path} has {len(images)} images")
            images.keep(n)
        self.images = images
        super().__init__({"reference": str(images.path), "n_reference": len(images)})

    def batches(self, batch_size: int, quiet: bool) -> Iterator[Tensor]:
        total = shared_images(len(self.images), batch_size)
        return counted(self.images.batches(batch_size), OF_REAL, total, quiet)


class StatisticsFile(Reference):
    """mu and sigma of an .npz. Scores that need images use the images in the same file, if there are any."""

    def __init__(self, path: Path, images: ManyImages | None):
        self.content = load_statistics(path)
        self.beside = None if images is None else FinishedReference(images, None)
        super().__init__({"reference": str(path), "n_reference": self.content.n})
        if images is not None:
            self.about["n_images"] = len(images)

    def statistics(self, extractor: FeatureExtractor, batch_size: int, quiet: bool) -> Statistics | None:
        return self.content

    def batches(self, batch_size: int, quiet: bool) -> Iterator[Tensor]:
        assert self.beside is not None, "scores that need images against statistics alone"
        return self.beside.batches(batch_size, quiet)


class DatasetReference(Reference):
    """The training set under the training transform, without flips; its statistics are cached.

    The n images are evenly spaced over all files, also broken ones, so that they are chosen before any is decoded;
    broken ones are then skipped.
    """

    def __init__(self, dataset: ImageDataset, n: int | None, cache_dir: Path):
        if n is not None and n > len(dataset):
            raise InputError(f"--n_reference {n}: the dataset has {len(dataset)} images")
        self.indices = evenly_spaced(len(dataset), n or len(dataset))
        self.dataset, self.cache_dir = dataset, cache_dir
        self.broken: dict[str, str] = {}  # reasons by name of chosen files; on process 0 those of all processes
        super().__init__(dataset.describe() | {"n_reference": len(self.indices)} | _noted(dataset.left_out))
        self.key = [READING, dict(self.about)]

    def batches(self, batch_size: int, quiet: bool) -> Iterator[Tensor]:
        with Progress(OF_REAL, shared_images(len(self.indices), batch_size), quiet=quiet) as bar:
            for start in share(range(0, len(self.indices), batch_size)):
                chosen = self.indices[start : start + batch_size]
                images, broken = self.dataset.whole_and_broken(chosen)
                self.broken |= {self.dataset.name_of(index): why for index, why in broken.items()}
                if whole := [row for row, index in enumerate(chosen) if index not in broken]:
                    yield images[whole] if broken else images
                bar.update(len(chosen))
        if len(self.broken) == len(self.indices):
            name, why = next(iter(self.broken.items()))
            raise InputError(f"{self.about['source']}: no image can be read ({name}: {why})")

    def statistics(self, extractor: FeatureExtractor, batch_size: int, quiet: bool) -> Statistics | None:
        """The cached statistics, which include the list of skipped files, or new ones.

        The key of the cache contains the fingerprint of all files, so it changes with every change of a file.
        """
        key = json.dumps([*self.key, extractor.describe()], sort_keys=True)
        digest = hashlib.sha256(key.encode()).hexdigest()[:16]
        name = f"{self.about['dataset']}_{len(self.indices)}_{extractor.name}_{digest}.npz"
        path = writable_folder(self.cache_dir) / name
        known = self._cached(path) if is_main() else None
        if on_main(lambda: known is not None):
            return known
        statistics = super().statistics(extractor, batch_size, quiet)
        self._share_broken()
        if statistics is not None:
            try:
                save_statistics(path, statistics, self.broken)
            except WriteError as error:  # the score does not need the cache
                log.warning("%s; the next run will compute them again", error)
        return statistics

    def _cached(self, path: Path) -> Statistics | None:
        if not path.exists():
            return None
        try:
            statistics, left_out = load_statistics(path), load_left_out(path)
            if statistics.n != len(self.indices) - len(left_out):
                raise InputError(f"{path}: of {statistics.n} images, without {len(left_out)} broken ones")
        except InputError as error:
            log.warning("computing again: %s", error)
            return None
        self.broken = left_out
        return statistics

    def _share_broken(self) -> None:
        for met in gather(self.broken) or []:
            self.broken |= met

    def account(self) -> None:
        self._share_broken()
        broken = dict(sorted(self.broken.items()))  # files known as broken earlier were named at opening
        say_left_out(broken, self.about.get("source", self.about["dataset"]))
        left_out = {**self.dataset.left_out, **broken}
        self.about |= {"n_reference": len(self.indices) - len(self.broken)} | _noted(left_out)
        if len(self.indices) == len(self.dataset):
            self.about["images"] = self.about["n_reference"]  # as for a packed copy, which has no broken images


def _noted(left_out: Mapping[str, str]) -> dict[str, Any]:
    return {"left_out": dict(left_out)} if left_out else {}


def open_reference(real: ReferenceSettings, scored: Samples, metrics: Sequence[str]) -> Reference:
    """Open the reference. Raises InputError if its images and the samples differ in size or channels."""
    samples = scored.images
    width, height = samples.size
    if real.dataset:
        if width != height:
            raise InputError(f"{samples.path} contains images of {width} x {height}, but those of datasets are square")
        crop = real.crop or (scored.crop if scored.dataset == real.dataset else None)
        dataset = open_dataset(
            real.dataset,
            real.data_path,
            img_size=width,
            in_chans=samples.in_chans,
            crop=crop,
            download=real.download,
        )
        assert real.cache_dir is not None, "a dataset without a folder for its statistics"
        return DatasetReference(dataset, real.n_reference, real.cache_dir)
    assert real.reference is not None, "neither a dataset nor a reference"
    names = [] if real.reference.is_dir() else array_names(real.reference)
    statistics = {"mu", "sigma"} <= set(names)
    if names and not statistics and ARRAY not in names:
        raise InputError(f"{real.reference}: wanted mu and sigma, or images in {ARRAY}; it has {', '.join(names):.120}")
    if statistics and real.n_reference:
        raise InputError(
            f"--n_reference: {real.reference} contains statistics, which cannot be reduced to fewer images"
        )
    needs_images = bool({"kid", "prc"} & set(metrics))
    if statistics and not needs_images:
        return StatisticsFile(real.reference, None)
    if statistics and ARRAY not in names:
        raise InputError(
            f"--metrics kid, prc need real images, but {real.reference} has only statistics; give --dataset, a folder "
            f"or an .npz with {ARRAY}"
        )
    images = open_images(real.reference)
    if (images.size, images.in_chans) != (samples.size, samples.in_chans):
        raise InputError(
            f"{images.path} contains images of {images.size[0]} x {images.size[1]} ({images.in_chans} channels), "
            f"{samples.path} of {width} x {height} ({samples.in_chans}): sizes must be equal; for other real "
            "images use --dataset folder --data_path, which resizes and crops as training does"
        )
    return StatisticsFile(real.reference, images) if statistics else FinishedReference(images, real.n_reference)
