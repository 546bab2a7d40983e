"""The distance between images that two runs make of the same noise: PSNR, and a distance of features.

Work on caching and other shortcuts reports these beside a score: the score tells whether the images are as good, the
distance tells whether they are the same.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from common.progress import Progress
from evaluation.comparison import Pairs, Run, Summary, estimate
from evaluation.features import FeatureExtractor, features_of
from evaluation.images import FinishedImages

BATCH = 64  # images in memory, of each of two runs


def psnr(one: Tensor, other: Tensor) -> Tensor:
    """The peak signal-to-noise ratio, 10 log10(255^2 / mean squared error) dB. uint8 (B, C, H, W) twice -> (B,).

    The sum of squared differences counts as 1 at least, which is one value off by one level: the ratio of equal images
    is then that of the nearest unequal ones, and means over images stay finite.
    """
    squares = (one.double() - other.double()).square().flatten(1).sum(dim=1)
    return 10 * (255**2 * one[0].numel() / squares.clamp(min=1)).log10()


def feature_distance(one: Tensor, other: Tensor) -> Tensor:
    """The squared distance of features scaled to unit length, in [0, 4]. (B, D) twice -> (B,).

    This is the distance of Zhang et al. 2018 (LPIPS), Eq. 1, with the extractor's output as the only layer, a single
    position in it, and all weights equal to 1; it is twice the cosine distance. It is not LPIPS, which uses other
    networks, all positions of five layers, and weights fitted to human judgements.
    """
    one, other = (F.normalize(features.double(), dim=1) for features in (one, other))
    return (one - other).square().sum(dim=1)


class _Measured(NamedTuple):
    """The distances of the images of one run."""

    psnr: list[float]
    feature_distance: list[float]  # empty without an extractor


def with_pairs(
    summaries: Sequence[Summary], to: str, n: int, extractor: FeatureExtractor | None, quiet: bool
) -> list[Summary]:
    """The summaries with the `Pairs` of each label but `to`.

    n: number of images of each run, those with the smallest indices. Raises InputError for unreadable images.
    """
    standard = {run.seed: run for summary in summaries if summary.label == to for run in summary.runs}
    others = [summary for summary in summaries if summary.label != to]
    images = {run.folder: FinishedImages(run.folder, n) for summary in summaries for run in summary.runs}
    unshared = {summary.label: _unshared(summary, standard, images) for summary in others}
    paired = [run for summary in others if unshared[summary.label] is None for run in summary.runs]
    found: dict[Path, _Measured] = {}
    with Progress("pairs", sum(len(images[run.folder]) for run in paired), quiet=quiet) as bar:
        for seed, run in standard.items():
            folders = [other.folder for other in paired if other.seed == seed]
            found |= _measured(images[run.folder], {folder: images[folder] for folder in folders}, extractor, bar)

    def pairs_of(summary: Summary) -> Pairs:
        if word := unshared[summary.label]:
            return Pairs(to, word)
        runs = [found[run.folder] for run in summary.runs]
        return Pairs(
            to,
            None,
            estimate([statistics.mean(run.psnr) for run in runs]),
            estimate([statistics.mean(run.feature_distance) for run in runs]) if extractor else None,
            [run.psnr for run in runs],
        )

    return [summary if summary.label == to else summary._replace(pairs=pairs_of(summary)) for summary in summaries]


def _unshared(summary: Summary, standard: Mapping[int, Run], images: Mapping[Path, FinishedImages]) -> str | None:
    """The difference to the images of the same seeds in one word; None if the images are pairs."""
    for run in summary.runs:
        if (other := standard.get(run.seed)) is None:
            return "seed"
        if different := [key for key, value in run.noise.items() if value != other.noise[key]]:
            return different[0]
        one, two = images[run.folder], images[other.folder]
        if [path.name for path in one.files] != [path.name for path in two.files]:
            return "samples"
        if (one.size, one.in_chans) != (two.size, two.in_chans):
            return "shape"
    return None


def _measured(
    standard: FinishedImages, runs: Mapping[Path, FinishedImages], extractor: FeatureExtractor | None, bar: Progress
) -> dict[Path, _Measured]:
    """The distances of each of the runs of one seed to the standard one, by folder."""
    found = {folder: _Measured([], []) for folder in runs}
    if not runs:
        return found
    for batch, *batches in zip(*(images.batches(BATCH) for images in (standard, *runs.values())), strict=True):
        features = features_of(extractor, batch)[0] if extractor else None
        for measured, images in zip(found.values(), batches, strict=True):
            measured.psnr.extend(psnr(images, batch).tolist())
            if extractor and features is not None:
                measured.feature_distance.extend(feature_distance(features_of(extractor, images)[0], features).tolist())
            bar.update(len(images))
    return found
