"""Checkpoints: everything a run needs to go on, in one file, whole or not there."""

from __future__ import annotations

import itertools
import logging
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Any

import torch
from torch import Tensor

from common.config import Config
from common.errors import InputError
from common.files import lock, replacing
from common.settings import check_types, shown
from models.pickles import check_pickles
from models.weights import FORMAT, check_numbers, read_pth

log = logging.getLogger(__name__)


# What a run goes on from, and its type.
TRAINING_STATE: dict[str, type | UnionType] = {
    **dict.fromkeys(("step", "n_steps"), int),
    **dict.fromkeys(("config", "options", "conditions", "data", "model", "optimizer", "scaler", "counters"), dict),
    "ema": dict | None,
}


class CheckpointFolder:
    """The checkpoints of a run: `<prefix>_last.pth`, and `<prefix>_step-<N>.pth` that stay."""

    def __init__(self, folder: Path, prefix: str):
        self.folder, self.prefix = folder, prefix
        self.last = folder / f"{prefix}_last.pth"
        self._lock: object = None  # held while this process lives

    def claim(self) -> None:
        """Keep other trainings out of the folder, if it is there, for as long as this process lives.

        Raises InputError where another is in it: two would take each other's files for leftovers.
        """
        if self._lock is None and self.folder.is_dir():
            self._lock = lock(self.folder / ".lock", f"{self.folder}: another training is at work there")

    def at_step(self, step: int) -> Path:
        return self.folder / f"{self.prefix}_step-{step}.pth"

    def numbered(self) -> dict[int, Path]:
        """Those that stay, by the step of their name, rising."""
        found = {}
        for path in self.folder.glob(f"{self.prefix}_step-*.pth"):
            if match := re.fullmatch(rf"{re.escape(self.prefix)}_step-(\d+)\.pth", path.name):
                found[int(match[1])] = path
        return dict(sorted(found.items()))

    def newest_first(self) -> list[Path]:
        """What is there, by the step inside; a file that cannot say goes by its name, a last one before all."""
        named = {path: float(step) for step, path in self.numbered().items()}
        if self.last.exists():
            named[self.last] = float("inf")
        steps = {path: step_of(path) for path in named}
        newness = {path: (named[path] if steps[path] is None else steps[path], path == self.last) for path in named}
        return sorted(named, key=newness.__getitem__, reverse=True)

    def newest_whole(self) -> Path:
        """The newest checkpoint that is whole; damaged ones before it are named in a warning and moved aside."""
        for path in self.newest_first():
            if not os.access(path, os.R_OK):
                raise InputError(f"{path}: no permission to read it")
            try:
                read_checkpoint(path)
                return path
            except InputError as error:
                log.warning("passed over %s; it is now %s", error, set_aside(path).name)
        raise InputError(f"--resume: no checkpoint of {self.prefix} in {self.folder}; to begin, leave --resume out")

    def tidy(self, newest: Path, keep: int | None) -> None:
        """Do what a killed training was about to: make the newest the last one too, and thin out the others."""
        if newest != self.last:
            with replacing(self.last) as temporary:
                shutil.copyfile(newest, temporary)
        self.thin_out(keep)

    def thin_out(self, keep: int | None) -> None:
        """Remove all but the newest `keep` of those that stay; none if it is None."""
        for path in list(self.numbered().values())[: -keep if keep else 0]:
            path.unlink(missing_ok=True)


def set_aside(path: Path) -> Path:
    """Rename a damaged file, so that it is in nobody's way and still there to look at."""
    names = itertools.chain([".damaged"], (f".damaged{n}" for n in itertools.count(2)))
    aside = next(place for name in names if not (place := path.with_name(path.name + name)).exists())
    return path.rename(aside)


def step_of(path: Path) -> int | None:
    """The step of a checkpoint, without reading its tensors; None for a file that does not say."""
    try:
        check_pickles(path)
        step = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["step"]
    except Exception:  # the unpickler meets any bytes there are, and fails in any way there is
        return None
    return step if type(step) is int else None


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of this project with its training state; raises InputError for other files."""
    content = read_pth(path)
    if content.get("format") != FORMAT:
        raise InputError(f"{path}: holds weights but no training state of this project")
    check_state(content, path)
    return content


def check_state(content: Mapping[str, Any], path: Path) -> None:
    """Raises InputError where a run cannot go on from this content of a file."""
    if lacking := TRAINING_STATE.keys() - content.keys():
        raise InputError(f"{path}: its training state lacks {', '.join(sorted(lacking))}")
    for name, kind in TRAINING_STATE.items():
        if not isinstance(content[name], kind) or (kind is int and content[name] < 0):
            raise InputError(
                f"{path}: its training state is not one of this project's ({name} is {shown(content[name])})"
            )
    for name in ("options", "conditions", "data"):  # settings, which are compared with those of the run
        if next(tensors_in(content[name]), None) is not None:
            raise InputError(f"{path}: its training state is not one of this project's (a tensor in {name})")
    check_types(Config, content["config"], str(path))
    for name in ("model", "ema"):
        check_numbers(content[name] or {}, path, name)


def write_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """content: tensors and plain values, nested.

    Raises InputError if a number in it is not finite, WriteError if the disk does not take it; the old file stays.
    """
    if not all_finite(content):
        raise InputError(
            f"step {content['step']}: the weights are not finite, so {path.name} was not written; the training "
            "diverged. Go on from an earlier checkpoint, with a lower --lr or without fp16"
        )
    with replacing(path) as temporary, temporary.open("wb") as file:
        torch.save({"format": FORMAT, **content}, file)


def all_finite(content: Any) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors_in(content) if tensor.is_floating_point())


def tensors_in(content: Any) -> Iterator[Tensor]:
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, Mapping | list | tuple):
        for value in content.values() if isinstance(content, Mapping) else content:
            yield from tensors_in(value)


if __name__ == "__main__":  # python -m training.checkpoint export IN OUT
    from training.export import main

    main(sys.argv[2:])
