"""What the settings of all measurements over several seeds share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from common.errors import InputError
from common.settings import Checked
from experiments.runner import words_of


def check_seeds(seeds: Sequence[int]) -> None:
    """Raises InputError where no interval over them can be made."""
    if len(seeds) < 2 or len(set(seeds)) < len(seeds):
        raise InputError("--seeds: give two or more that differ, for there are intervals over them")


def words(settings: Checked, *left_out: str) -> list[str]:
    """The flags of the command line that gives these settings. left_out: names of fields without their flag."""
    changed: dict[str, Any] = {}
    for f in fields(settings):  # type: ignore[arg-type]
        value = getattr(settings, f.name)
        if value != f.default and f.name not in left_out:
            changed[f"no-{f.name}" if value is False else f.name] = True if value is False else value
    return words_of((), changed)
