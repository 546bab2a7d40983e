"""The settings that all measurements over several seeds share."""

from __future__ import annotations

from dataclasses import dataclass, fields

from common.errors import InputError
from common.options import MOST_SEED
from common.settings import Checked, option
from experiments.runner import words_of


@dataclass(frozen=True, kw_only=True)
class MeasurementSettings(Checked):
    """Settings of a measurement that writes a page."""

    seeds: tuple[int, ...] = option((0, 1, 2), "at least two seeds of networks and samples", least=0, most=MOST_SEED)
    quick: bool = option(
        False, "make a short run that checks all parts; all files, also the page, go to a folder quick/ in results/"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.seeds) < 2 or len(set(self.seeds)) < len(self.seeds):
            raise InputError("--seeds: give two or more that differ, for there are intervals over them")

    def words(self, *left_out: str) -> list[str]:
        """The flags of the command line that gives these settings. left_out: names of fields without their flag."""
        changed = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        flags = {f"no-{name}" if value is False else name: value or True for name, value in changed.items()}
        return words_of((), {name: value for name, value in flags.items() if name not in left_out})
