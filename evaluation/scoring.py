"""The scores of a folder of samples, with all settings that they depend on.

FID is computed here, streamed in float64; KID, Inception score and precision/recall are from torch-fidelity.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from common.distributed import is_main
from common.errors import InputError
from common.files import writable_folder, write_json
from evaluation.features import FeatureExtractor, extract_all
from evaluation.kid import contributions
from evaluation.references import Reference
from evaluation.samples import Samples
from evaluation.settings import KID_SUBSET_SIZE, KID_SUBSETS
from evaluation.statistics import Statistics, frechet_distance, sums_of

log = logging.getLogger(__name__)

TERM_DIGITS = 7  # in metrics.json
SEED = 2020  # seed of the subsets of KID and the splits of the Inception score
LEAST = {"fid": 2, "kid": 2, "prc": 4}  # least number of images on either side


class Scores(NamedTuple):
    values: dict[str, float]  # {"fid": ..., ...}
    kid_terms: list[float] | None = None  # of `contributions`


def score(
    samples: Samples,
    reference: Reference,
    extractor: FeatureExtractor,
    metrics: Sequence[str],
    batch_size: int,
    quiet: bool,
) -> Scores:
    """Compute scores. metrics: some of fid, kid, is, prc. Process 0 has them, the others have none.

    Raises InputError if there are too few images for a metric.
    """
    chosen = set(metrics)
    features = logits = real_features = None  # on process 0, if the metrics need them
    for metric in metrics:
        check_enough(metric, len(samples.images), reference.about.get("n_reference"))
    if chosen == {"fid"}:  # needs no features in memory
        mine = samples.statistics(extractor, batch_size, quiet)
    else:
        features, logits = extract_all(extractor, samples.batches(batch_size, quiet))
    real = reference.statistics(extractor, batch_size, quiet) if "fid" in chosen else None
    if chosen & {"kid", "prc"}:
        real_features, _ = extract_all(extractor, reference.batches(batch_size, quiet))
    reference.account()
    if not is_main():
        return Scores({})

    scores: dict[str, float] = {}
    terms = None
    if "fid" in metrics:
        if features is not None:
            mine = sums_of(features.split(batch_size)).finish()
        assert mine is not None and real is not None, "process 0 has no statistics"
        warn_if_few(mine, real)
        scores["fid"] = frechet_distance(mine, real)
    if "is" in metrics:
        assert logits is not None, "an Inception score without the logits of Inception"
        scores |= inception_score(logits)
    if chosen & {"kid", "prc"}:
        assert features is not None and real_features is not None, "process 0 has no features"
        if "kid" in metrics:
            scores |= kernel_distance(features, real_features)
            terms = contributions(features, real_features).tolist()
        if "prc" in metrics:
            scores |= precision_recall(features, real_features)
    if wrong := [name for name, value in scores.items() if not math.isfinite(value)]:
        raise InputError(f"{wrong[0]} is not finite: the features are too large for this score")
    return Scores(scores, terms)


def check_enough(metric: str, n_samples: int, n_real: int | None) -> None:
    """Raises InputError if there are too few images for the metric. n_real: None if unknown."""
    for n, side in ((n_samples, "to score"), (n_real, "to score against")):
        if n is not None and n < LEAST.get(metric, 1):
            raise InputError(
                f"--metrics {metric}: {n} images are too few {side}, at least {LEAST[metric]} are needed on either side"
            )


def warn_if_few(*both: Statistics) -> None:
    for statistics in both:
        if statistics.n is not None and statistics.n <= len(statistics.mu):
            log.warning(
                "%d images for %d features: the covariance is singular and the FID far too high to compare",
                statistics.n,
                len(statistics.mu),
            )


def kernel_distance(samples: Tensor, real: Tensor) -> dict[str, float]:
    """KID (Binkowski et al. 2018), mean and standard deviation over subsets. samples: (N, D). real: (M, D)."""
    from torch_fidelity.metric_kid import kid_features_to_metric

    check_enough("kid", len(samples), len(real))
    size = min(KID_SUBSET_SIZE, len(samples), len(real))
    # A small difference of large sums: in float32 its fifth digit depends on the number of threads.
    with np.errstate(over="ignore"):  # `score` refuses what is not finite
        found = kid_features_to_metric(
            samples.double(), real.double(), kid_subsets=KID_SUBSETS, kid_subset_size=size, rng_seed=SEED, verbose=False
        )
    return {
        "kid": float(found["kernel_inception_distance_mean"]),
        "kid_std": float(found["kernel_inception_distance_std"]),
    }


def inception_score(logits: Tensor) -> dict[str, float]:
    """Salimans et al. 2016, mean and standard deviation over 10 splits. logits: (N, K)."""
    from torch_fidelity.metric_isc import isc_features_to_metric

    found = isc_features_to_metric(logits, splits=min(10, len(logits)), rng_seed=SEED)
    return {
        "is": float(found["inception_score_mean"]),
        "is_std": float(found["inception_score_std"]),
    }


def precision_recall(samples: Tensor, real: Tensor) -> dict[str, float]:
    """Kynkaanniemi et al. 2019, with the 3 nearest neighbours. samples: (N, D). real: (M, D)."""
    from torch_fidelity.metric_prc import prc_features_to_metric

    check_enough("prc", len(samples), len(real))
    found = prc_features_to_metric(samples, real, prc_neighborhood=3, save_cpu_ram=True, verbose=False)
    return {"precision": float(found["precision"]), "recall": float(found["recall"])}


def write_scores(samples: Samples, reference: Reference, extractor: FeatureExtractor, scores: Scores) -> Path:
    """Write metrics.json into the report of the samples: the scores, and the settings that they depend on."""
    path = writable_folder(samples.report) / "metrics.json"
    content = scores.values | {
        "n_samples": len(samples.images),
        "samples": str(samples.images.path),
        "reference": reference.about,
        "feature_extractor": extractor.describe(),
        "run": {key: samples.run.get(key) for key in ("backbones", "settings")},
    }
    if scores.kid_terms is not None:
        content["kid_terms"] = [float(f"{term:.{TERM_DIGITS}g}") for term in scores.kid_terms]
    write_json(path, content)
    return path
