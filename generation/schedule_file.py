"""Which network runs at which timesteps, as a YAML file: calibrate.py writes it, sampler.py --schedule reads it.

    stages:                            # from the noisiest timesteps to the cleanest
      - checkpoint_path: shallow.pth   # from the folder of this file, or absolute
        config_path: shallow.yaml      # optional; for weights that came without a description
        t_min: 400                     # the lowest and the highest timestep at which it runs
        t_max: 999
        guidance_scale: 0.4            # optional; the run's own if not said
      - checkpoint_path: full.pth
        t_min: 0
        t_max: 399
    t_switch: 399                      # optional, of at most two stages: what --t_switch would be
    calibration: {...}                 # optional: how the stages were found. sampler.py looks at solver and steps

No torch in here.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from common.config import build, read_mapping
from common.errors import InputError
from common.files import replacing


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A network at the timesteps t_min..t_max, both included. The fields are the keys in the file."""

    checkpoint_path: Path
    config_path: Path | None = None
    t_min: int
    t_max: int
    guidance_scale: float | None = None  # None: the run's own

    def __post_init__(self) -> None:
        if not 0 <= self.t_min <= self.t_max:
            raise InputError(f"t_min={self.t_min}, t_max={self.t_max}: wanted 0 <= t_min <= t_max")
        if self.guidance_scale is not None and not 0 <= self.guidance_scale <= 1000:
            raise InputError(f"guidance_scale={self.guidance_scale:g} is outside 0..1000")


@dataclass(frozen=True, kw_only=True)
class ScheduleFile:
    """What the file holds. Raises InputError unless the stages follow each other down to t = 0."""

    stages: list[Stage]
    t_switch: int | None = None
    calibration: dict | None = None  # plain values

    def __post_init__(self) -> None:
        if not self.stages:
            raise InputError("no stages; wanted at least one network")
        for n, (above, below) in enumerate(zip(self.stages, self.stages[1:], strict=False), 1):
            if below.t_max != above.t_min - 1:
                fault = "overlap, or do not fall" if below.t_max >= above.t_min else "leave a gap"
                raise InputError(
                    f"stages {n} and {n + 1} {fault}: the first ends at t_min={above.t_min}, the second must begin at "
                    f"t_max={above.t_min - 1}, not {below.t_max}"
                )
        if lowest := self.stages[-1].t_min:
            raise InputError(f"no network for t = 0..{lowest - 1}: the last stage must have t_min=0")
        if self.t_switch is not None and self.t_switch not in self._t_switches():
            raise InputError(f"t_switch={self.t_switch} contradicts the stages")

    def _t_switches(self) -> Sequence[int]:
        """What --t_switch may be to mean the same."""
        return {1: (-1, self.stages[0].t_max), 2: self.switches}.get(len(self.stages), ())

    @property
    def switches(self) -> list[int]:
        """The timesteps at which the next stage begins: those of `diffusion.sampling.SwitchingDenoiser`."""
        return [stage.t_max for stage in self.stages[1:]]

    @property
    def num_timesteps(self) -> int:
        return self.stages[0].t_max + 1


def read_schedule(path: Path) -> ScheduleFile:
    """The schedule with its paths as they can be opened from here.

    Raises InputError, which names the file, for keys nobody reads, values of the wrong type, stages that do not
    follow each other, and files that are not there.
    """
    given = read_mapping(path, "stages", list)
    schedule = build(ScheduleFile, given, str(path))
    stages = []
    for n, stage in enumerate(schedule.stages, 1):
        paths = {name: getattr(stage, name) for name in ("checkpoint_path", "config_path")}
        paths = {name: path.parent / given for name, given in paths.items() if given is not None}
        for name, file in paths.items():
            if not file.is_file():
                fault = "is a folder" if file.is_dir() else "no such file"
                raise InputError(f"{path}: stages {n}: {name} {file}: {fault}")
        stages.append(replace(stage, **paths))
    return replace(schedule, stages=stages)


def is_calibration(path: Path) -> bool:
    """Whether it is a file that a calibration wrote, and may write again."""
    try:
        return isinstance(read_mapping(path, "stages", list).get("calibration"), dict)
    except InputError:
        return False


def write_schedule(path: Path, schedule: ScheduleFile) -> None:
    """Paths are written as seen from the folder of the file, so that a folder with its checkpoints can be moved."""

    def seen_from_there(file: Path) -> str:
        file = file.parent.resolve() / file.name
        try:
            return Path(os.path.relpath(file, path.parent.resolve())).as_posix()
        except ValueError:  # on another drive of Windows
            return str(file)

    def plain(fields: list[tuple[str, Any]]) -> dict[str, Any]:
        given = {name: value for name, value in fields if value is not None}
        return {name: seen_from_there(value) if isinstance(value, Path) else value for name, value in given.items()}

    with replacing(path) as temporary:
        text = yaml.dump(asdict(schedule, dict_factory=plain), Dumper=_PlainDumper, sort_keys=False)
        temporary.write_text(text, encoding="utf-8")


class _PlainDumper(yaml.SafeDumper):
    """Writes what occurs twice twice: the reader takes no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True
