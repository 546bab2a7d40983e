"""Samples of many ways to save work: what they cost, how they score, how far they are from the full network's."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.files import read_json, replacing, writable_folder
from data import open_dataset
from data.dataset import ImageDataset
from evaluation.features import FeatureExtractor, extract_all
from evaluation.images import FinishedImages, evenly_spaced
from evaluation.pairs import psnr
from experiments.kid import interval_of, resamplings, towards, within
from experiments.runner import Flags, Runner, slug
from experiments.sets import Sampler

MOST_REAL = 10_000  # real images, evenly spaced
BATCH = 100
SCALE = 1000  # of KID, for numbers that are easy to read
TIMED_ROUNDS, TIMED = 3, 50  # images of a round

Ways = Mapping[str, Callable[[int], Flags]]  # the flags of a way to sample by its label, for a seed
Row = Mapping[str, Any]


class Samples:
    """n_samples images of each seed for each way and sampler, with their features, in the folder `work`.

    real: the images that scores compare with.
    """

    def __init__(
        self,
        real: ImageDataset,
        extractor: FeatureExtractor,
        work: Path,
        run: Runner,
        seeds: Sequence[int],
        n_samples: int,
        precision: str,
    ):
        self.extractor, self.work, self.run, self.seeds = extractor, work, run, seeds
        self.n_samples, self.precision = n_samples, precision
        self.n_real = min(MOST_REAL, len(real))
        self.real = self.features("real", lambda: real.__getitems__(evenly_spaced(len(real), self.n_real))[0])
        self.of_real = within(self.real)  # the term of KID that does not depend on the samples

    def rows(self, sampler: Sampler, ways: Ways) -> Sequence[Row]:
        """A row for each way, with a value for each seed. The others are compared with the first one."""
        folders = {
            label: [self.sampled(sampler, flags(seed), seed) for seed in self.seeds] for label, flags in ways.items()
        }
        weights = [resamplings(self.n_samples, seed) for seed in self.seeds]
        rows: list[dict[str, Any]] = []
        # Of each seed the first way's terms of KID, (1 + R,), and its images.
        standard: list[Tensor] = []
        images = [images_of(folder) for folder in next(iter(folders.values()))]
        for label, of_label in folders.items():
            terms = [towards(self.real, self.features_of(f), w) for f, w in zip(of_label, weights, strict=True)]
            reports = [read_json(folder / "report" / "statistics.json") for folder in of_label]
            row: dict[str, Any] = {
                "label": label,
                "folders": [str(folder) for folder in of_label],
                "flops": statistics.mean(report["network_flops_per_image"] for report in reports),
                "kid": [SCALE * float(of[0] + self.of_real) for of in terms],
            }
            if rows:
                differences = [SCALE * (own - full) for own, full in zip(terms, standard, strict=True)]
                row["difference"] = [float(of[0]) for of in differences]
                row["interval"] = interval_of([of[1:] for of in differences])
                row["psnr"] = [psnr(images_of(f), full).mean().item() for f, full in zip(of_label, images, strict=True)]
            else:
                standard = terms
            rows.append(row)
        return rows

    def timed(self, sampler: Sampler, ways: Ways, rows: Sequence[Row]) -> list[Row]:
        """The rows of these ways with their seconds per image and their speed-ups, in each of TIMED_ROUNDS rounds.

        The ways take turns, so that a machine that is slower for a while is so for all of them.
        """
        seconds: dict[str, list[float]] = {label: [] for label in ways}
        for number in range(TIMED_ROUNDS):
            for label, flags in ways.items():
                folder = self.sampled(sampler, flags(self.seeds[0]), self.seeds[0], number)
                seconds[label].append(read_json(folder / "report" / "statistics.json")["seconds_per_image"])
        full = seconds[rows[0]["label"]]
        speed_ups = {label: [a / b for a, b in zip(full, own, strict=True)] for label, own in seconds.items()}
        return [{**row, "seconds": seconds[row["label"]], "speed_up": speed_ups[row["label"]]} for row in rows]

    def sampled(self, sampler: Sampler, flags: Flags, seed: int, timed: int | None = None) -> Path:
        """The folder of samples that a script makes with these flags. timed: the number of a round."""
        how: Flags = {**sampler._asdict(), "precision": self.precision, **flags}
        words = [name_of(value) if isinstance(value, Path) else f"{name}_{value}" for name, value in flags.items()]
        name, n = slug(*sampler, *words, f"seed {seed}"), self.n_samples
        folder = self.work / "samples" / name
        if timed is not None:
            folder, n = self.work / "timed" / f"{name}_{timed}", min(TIMED, n)
        some: Flags = {"n_samples": n, "batch_size": min(BATCH, n), "seed": seed}
        self.run("eesampler" if "threshold" in flags else "sampler", **how, **some, output_folder=folder)
        return folder

    def features_of(self, folder: Path) -> Tensor:
        return self.features(folder.name, lambda: images_of(folder))

    def features(self, name: str, images: Callable[[], Tensor]) -> Tensor:
        """Features (N, D) in float64 of uint8 images (N, C, H, W), from their file if there is one."""
        path = writable_folder(self.work / "features") / f"{name}.npy"
        if not path.exists():
            print(f"features: {name}", flush=True)
            found, _ = extract_all(self.extractor, images().split(BATCH))
            assert found is not None, "this is the only process"
            with replacing(path) as temporary, temporary.open("wb") as file:
                np.save(file, found.cpu().numpy())
        return torch.from_numpy(np.load(path)).double()


def real_images(data: Flags, img_size: int, in_chans: int) -> ImageDataset:
    """data: the flags that name a dataset."""
    return open_dataset(data["dataset"], data.get("data_path"), img_size=img_size, in_chans=in_chans)


def name_of(path: Path) -> str:
    """Of a checkpoint, a folder of weights or a file of stages."""
    return path.parent.name if path.suffix == ".pth" else path.stem


def images_of(folder: Path) -> Tensor:
    """All samples of a folder by their numbers, uint8 (N, C, H, W)."""
    return torch.cat(list(FinishedImages(folder).batches(BATCH)))
