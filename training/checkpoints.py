"""Checkpoints: everything a run needs to go on, in one file, whole or not there."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import InputError
from common.files import replacing
from models.weights import FORMAT, read_pth

log = logging.getLogger(__name__)


TRAINING_STATE = {"step", "n_steps", "config", "options", "model", "ema", "optimizer", "scaler", "sums", "summed_steps"}


class CheckpointFolder:
    """The checkpoints of a run: `<prefix>_last.pth`, and `<prefix>_step-<N>.pth` that stay."""

    def __init__(self, folder: Path, prefix: str):
        self.folder, self.prefix = folder, prefix
        self.last = folder / f"{prefix}_last.pth"

    def at_step(self, step: int) -> Path:
        return self.folder / f"{self.prefix}_step-{step}.pth"

    def newest_first(self) -> list[Path]:
        """What is there, the last one first, then by falling step (as numbers)."""
        numbered = {}
        for path in self.folder.glob(f"{self.prefix}_step-*.pth"):
            if match := re.fullmatch(rf"{re.escape(self.prefix)}_step-(\d+)\.pth", path.name):
                numbered[int(match[1])] = path
        return [self.last] * self.last.exists() + [numbered[step] for step in sorted(numbered, reverse=True)]

    def load_newest(self) -> tuple[Path, dict[str, Any]]:
        """The newest checkpoint that can be read; damaged ones are named in a warning."""
        for path in self.newest_first():
            try:
                return path, read_checkpoint(path)
            except InputError as error:
                log.warning("passed over %s", error)
        raise InputError(f"--resume: no checkpoint of {self.prefix} in {self.folder}")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of this project with its training state; raises InputError for other files."""
    content = read_pth(path)
    if content.get("format") != FORMAT:
        raise InputError(f"{path}: holds weights but no training state of this project")
    if lacking := TRAINING_STATE - content.keys():
        raise InputError(f"{path}: its training state lacks {', '.join(sorted(lacking))}")
    return content


def write_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """content: tensors and plain values, nested. Raises InputError if weights in it are not finite."""
    weights = [*content["model"].values(), *(content["ema"] or {}).values()]
    if not all_finite(weights):
        raise InputError(
            f"step {content['step']}: the weights are not finite, so {path.name} was not written; the training "
            "diverged. Go on from an earlier checkpoint, with a lower --lr or without fp16"
        )
    with replacing(path) as temporary:
        torch.save({"format": FORMAT, **content}, temporary)


def all_finite(tensors: Iterable[Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors if tensor.is_floating_point())
