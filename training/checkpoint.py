"""Checkpoints: the whole state of a run in one file, which is either complete or missing."""

from __future__ import annotations

import sys

if __name__ == "__main__":  # python -m training.checkpoint export IN OUT is python export.py IN OUT
    from common.startup import end_in_one_line

    end_in_one_line()  # on a signal during the imports below
    from training.export import main

    main(sys.argv[1 + (sys.argv[1:2] == ["export"]) :])
    sys.exit()

import itertools
import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any

import torch

from common.config import Config
from common.errors import InputError
from common.files import encodable, lock, replacing
from common.settings import check_types, shown
from models.pickles import check_pickles
from models.weights import FORMAT, check_numbers, read_pth, tensors_in

log = logging.getLogger(__name__)

# The entries of the state of a run, and their types.
TRAINING_STATE: dict[str, type | UnionType] = {
    **dict.fromkeys(("step", "n_steps"), int),
    **dict.fromkeys(("config", "options", "conditions", "data", "model", "optimizer", "scaler", "counters"), dict),
    "ema": dict | None,
}


class CheckpointFolder:
    """The checkpoints of a run: `<prefix>_last.pth`, and the kept ones `<prefix>_step-<N>.pth`."""

    def __init__(self, folder: Path, prefix: str):
        self.folder, self.prefix = folder, prefix
        self.last = folder / f"{prefix}_last.pth"
        self._lock: object = None  # held while this process lives

    def claim(self) -> None:
        """Lock the folder, if it exists, until this process ends.

        Raises InputError if another run has the lock, because each would remove the temporary files of the other.
        """
        if self._lock is None and self.folder.is_dir():
            self._lock = lock(self.folder / ".lock", f"{self.folder}: another training run uses this folder")

    def at_step(self, step: int) -> Path:
        return self.folder / f"{self.prefix}_step-{step}.pth"

    def numbered(self) -> dict[int, Path]:
        """The kept checkpoints by the step in their name, rising."""
        found = {}
        for path in self.folder.glob(f"{self.prefix}_step-*.pth"):
            if match := re.fullmatch(rf"{re.escape(self.prefix)}_step-(\d+)\.pth", path.name):
                found[int(match[1])] = path
        return dict(sorted(found.items()))

    def newest_first(self) -> list[Path]:
        """All checkpoints, sorted by the step in the file; unreadable ones by their name, `_last.pth` as the newest."""
        named = {path: float(step) for step, path in self.numbered().items()}
        if self.last.exists():
            named[self.last] = float("inf")
        steps = {path: step_of(path) for path in named}
        newness = {path: (named[path] if steps[path] is None else steps[path], path == self.last) for path in named}
        return sorted(named, key=newness.__getitem__, reverse=True)

    def newest_whole(self) -> Path:
        """The newest complete checkpoint. Damaged newer ones are renamed, with a warning."""
        for path in self.newest_first():
            if not os.access(path, os.R_OK):
                raise InputError(f"{path}: permission to read denied")
            try:
                read_checkpoint(path)
                return path
            except InputError as error:
                log.warning("skipped a damaged checkpoint and renamed it to %s: %s", set_aside(path).name, error)
        raise InputError(
            f"--resume: no checkpoint of {self.prefix} in {self.folder}; to start a new run, leave out --resume"
        )

    def tidy(self, newest: Path, keep: int | None) -> None:
        """Finish the work of a killed training: copy the newest checkpoint to `_last.pth`, and remove old ones."""
        if newest != self.last:
            with replacing(self.last) as temporary:
                shutil.copyfile(newest, temporary)
        self.thin_out(keep)

    def thin_out(self, keep: int | None) -> None:
        """Remove all kept checkpoints except the newest `keep`; remove none if it is None."""
        for path in list(self.numbered().values())[: -keep if keep else 0]:
            path.unlink(missing_ok=True)


def set_aside(path: Path) -> Path:
    """Rename a damaged file, so that it is ignored but not lost."""
    names = itertools.chain([".damaged"], (f".damaged{n}" for n in itertools.count(2)))
    aside = next(place for name in names if not (place := path.with_name(path.name + name)).exists())
    return path.rename(aside)


def step_of(path: Path) -> int | None:
    """The step of a checkpoint, without reading its tensors; None if the file has none."""
    try:
        check_pickles(path)
        with encodable(path) as file:
            step = torch.load(file, map_location="cpu", weights_only=True, mmap=True)["step"]
    except Exception:  # damaged bytes make the unpickler raise any error
        return None
    return step if type(step) is int else None


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint with a training state. Raises InputError for other files."""
    content = read_pth(path)
    if content.get("format") != FORMAT:
        raise InputError(f"{path}: has weights but no training state of this project")
    check_state(content, path)
    return content


def check_state(content: Mapping[str, Any], path: Path) -> None:
    """Raises InputError unless a run can continue from this content of a file."""
    if lacking := TRAINING_STATE.keys() - content.keys():
        raise InputError(f"{path}: its training state lacks {', '.join(sorted(lacking))}")
    for name, kind in TRAINING_STATE.items():
        if not isinstance(content[name], kind) or (kind is int and content[name] < 0):
            raise InputError(
                f"{path}: its training state is not one of this project's ({name} is {shown(content[name])})"
            )
    for name in ("options", "conditions", "data"):  # plain settings, which are compared with those of the run
        if next(tensors_in(content[name]), None) is not None:
            raise InputError(f"{path}: its training state is not one of this project's (a tensor in {name})")
    check_types(Config, content["config"], str(path))
    for name in ("model", "ema"):
        check_numbers(content[name] or {}, path, name)


def write_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """content: tensors and plain values, nested.

    Raises InputError if a number is not finite, WriteError if the disk is full or fails; the old file stays.
    """
    if not all(tensor.isfinite().all() for tensor in tensors_in(content) if tensor.is_floating_point()):
        raise InputError(
            f"step {content['step']}: the weights are not finite, so {path.name} was not written; the training "
            "diverged. Continue from an earlier checkpoint, with a lower --lr or without fp16"
        )
    with replacing(path) as temporary, temporary.open("wb") as file:
        torch.save({"format": FORMAT, **content}, file)
