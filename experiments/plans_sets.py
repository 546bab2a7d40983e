"""The sets of images that plans are measured on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.settings import EFFICIENTNET
from experiments.sets import GOOGLE, TrainedSet, digits, fetched_emoji

KID_REFERENCE = 1000  # real images, whose features are extracted for each score


@dataclass(frozen=True, kw_only=True)
class PlanSet(TrainedSet):
    """A set of images, and how samples are made and scored. precision: of training; all else is in fp32."""

    sampling_steps: int = 50
    extractor: Path | str  # of the features that samples are scored in
    metric: str = "kid"  # the score, of fid.py

    @property
    def score(self) -> str:
        name = "Fréchet distance" if self.metric == "fid" else f"{self.metric.upper()} x {self.scale}"
        return f"{name} in the features of {self.extractor}"

    @property
    def scale(self) -> int:
        """A factor of the score, for numbers that are easy to read."""
        return 1 if self.metric == "fid" else 1000

    @property
    def scoring(self) -> dict[str, Any]:
        """Flags of fid.py."""
        few = {} if self.metric == "fid" else {"n_reference": KID_REFERENCE}
        return {"feature_extractor": self.extractor, "metrics": self.metric, **few}

    def few(self) -> dict[str, Any]:
        return super().few() | {"sampling_steps": 10, "n_samples": 40}


def digits_for_plans() -> PlanSet:
    """With less training and fewer paths than for docs/results.md."""
    few: dict[str, Any] = {"full_steps": 2000, "shallow_steps": 1000, "lr": 2e-3, "n_calibration": 128}
    more: dict[str, Any] = {"n_samples": 1000, "precision": "bf16"}
    return PlanSet(**vars(digits()) | few | more, extractor=Path("experiments/digits_classifier.pt"), metric="fid")


def emoji_for_plans() -> PlanSet:
    """Emoji of one style. Raises InputError if they cannot be fetched."""
    return PlanSet(
        name="emoji",
        about=f"emoji of 64 x 64 ({GOOGLE.package}), reduced to 16 x 16 colour",
        img_size=16,
        in_chans=3,
        configs=("uvit_emoji16", "uvit_emoji16_1", "deediff_emoji16"),
        data={"dataset": "folder", "data_path": fetched_emoji(Path("results"), GOOGLE)},
        training_batch=64,
        full_steps=3000,
        shallow_steps=1000,
        exit_steps=1000,
        n_samples=500,
        n_calibration=128,
        extractor=EFFICIENTNET,
    )
