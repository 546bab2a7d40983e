"""Which network runs at which timesteps: from the flags of sampler.py, or from a YAML file of stages.

    stages:                            # from the noisiest timesteps to the cleanest
      - checkpoint_path: shallow.pth   # relative to the folder of this file, or absolute
        config_path: shallow.yaml      # optional; for weights without a description
        t_min: 400                     # the lowest and the highest timestep of the stage
        t_max: 999
        guidance_scale: 0.4            # optional (default: the run's own)
        guidance_t_min: 500            # optional, with guidance_t_max: guidance is off at t outside of these
      - checkpoint_path: full.pth
        t_min: 0
        t_max: 399
        correct_every: 4               # optional: how it saves work, see SavingSettings in generation/settings.py
        correct_with: shallow.pth      # the cheaper network of a correction (default: that of the first stage)
        correct_with_config: shallow.yaml   # its config_path, likewise
    t_switch: 399                      # optional, with at most two stages: the equal value of --t_switch
    calibration: {...}                 # optional: the measurement; sampler.py compares its solver and steps

calibrate.py writes such a file, sampler.py --stages reads it. No torch in here.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from common.config import read_mapping
from common.errors import InputError
from common.files import replacing
from common.settings import build, fields_of, option, plain
from generation.settings import RunSettings, SamplerSettings, SavingSettings

PATHS = ("checkpoint_path", "config_path", "correct_with", "correct_with_config")  # keys of a stage


@dataclass(frozen=True, kw_only=True)
class StageEntry(SavingSettings):
    """A network at the timesteps t_min..t_max, both included. The fields are the keys in the file."""

    checkpoint_path: Path
    config_path: Path | None = None
    t_min: int = option(least=0, most=99_999)
    t_max: int = option(least=0, most=99_999)
    guidance_scale: float | None = option(None, least=0, most=1000)  # None: that of the run, as for those below
    guidance_t_min: int | None = option(None, least=0, most=99_999)
    guidance_t_max: int | None = option(None, least=0, most=99_999)
    correct_with: Path | None = None
    correct_with_config: Path | None = None

    @property
    def saving(self) -> SavingSettings:
        return SavingSettings(**self.described)

    @property
    def cheap(self) -> tuple[Path, Path | None] | None:
        """The weights and the description of the cheaper network of a correction, if they are named."""
        return None if self.correct_with is None else (self.correct_with, self.correct_with_config)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.correct_with is not None and self.correct_every == 1:
            raise InputError("correct_with needs a correct_every of 2 or more")
        if self.correct_with_config is not None and self.correct_with is None:
            raise InputError("correct_with_config describes the network of correct_with; give correct_with too")
        if self.t_min > self.t_max:
            raise InputError(f"t_min={self.t_min}, t_max={self.t_max}: wanted t_min <= t_max")


@dataclass(frozen=True, kw_only=True)
class StageFile:
    """The content of a file of stages. Raises InputError for stages that overlap, leave gaps or do not end at t = 0."""

    stages: tuple[StageEntry, ...]
    t_switch: int | None = None
    calibration: dict[str, Any] | None = None  # plain values

    def __post_init__(self) -> None:
        if not self.stages:
            raise InputError("no stages; wanted at least one network")
        for n, (above, below) in enumerate(zip(self.stages, self.stages[1:], strict=False), 1):
            if below.t_max != above.t_min - 1:
                fault = "overlap, or do not go downwards" if below.t_max >= above.t_min else "leave a gap"
                raise InputError(
                    f"stages {n} and {n + 1} {fault}: the first ends at t_min={above.t_min}, the second must begin at "
                    f"t_max={above.t_min - 1}, not {below.t_max}"
                )
        if lowest := self.stages[-1].t_min:
            raise InputError(f"no network for t = 0..{lowest - 1}: the last stage must have t_min=0")
        if self.t_switch is not None and self.t_switch not in self._t_switches():
            raise InputError(f"t_switch={self.t_switch} contradicts the stages")

    def _t_switches(self) -> Sequence[int]:
        """The values of --t_switch that give the same stages."""
        one, two = (-1, self.stages[0].t_max), (self.stages[-1].t_max,)
        return {1: one, 2: two}.get(len(self.stages), ())


@dataclass(frozen=True)
class PlannedStage:
    """A stage before its network is loaded. Raises InputError for an empty interval of guidance."""

    network: int  # index in Plan.files
    t_min: int  # its lowest timestep; all higher ones belong to the stages before it
    guidance_scale: float
    option: str  # the source of guidance_scale, for messages
    guidance_t_min: int | None = None  # the scale is 0 at smaller t
    guidance_t_max: int | None = None  # and at larger t
    saving: SavingSettings = SavingSettings()
    cheap: int | None = None  # index in Plan.files of the cheaper network of a correction

    @property
    def networks(self) -> tuple[int, ...]:
        """All networks that run in the stage."""
        return (self.network,) if self.cheap is None else (self.cheap, self.network)

    def __post_init__(self) -> None:
        least, most = self.guidance_t_min, self.guidance_t_max
        if least is not None and most is not None and least > most:
            raise InputError(f"guidance_t_min {least} is more than guidance_t_max {most}")

    def guides(self, t: int) -> bool:
        """Whether the network is guided at t: it then runs each image twice, with its class and without."""
        above = self.guidance_t_min is None or t >= self.guidance_t_min
        below = self.guidance_t_max is None or t <= self.guidance_t_max
        return self.guidance_scale > 0 and above and below


@dataclass(frozen=True)
class Plan:
    """The networks of a run, and the stages at which they run, from the noisiest timesteps to the cleanest."""

    # Weights and YAML file of each network, in the order of their first stages; before them, those without a stage.
    files: Sequence[tuple[Path, Path | None]]
    stages: Sequence[PlannedStage]
    num_timesteps: int | None = None  # T, if the plan is from a file of stages
    calibration: dict[str, Any] | None = None  # the measurement in a file of stages
    source: str = "--t_switch"  # for messages

    @property
    def names(self) -> list[str]:
        """The names of the networks, for messages and reports."""
        if len(self.files) == 1:
            return ["backbone"]
        if [stage.network for stage in self.stages] == [0, 1]:
            return ["shallow", "full"]
        return [f"network {n}" for n in range(1, len(self.files) + 1)]

    @property
    def lowest(self) -> list[int]:
        """The lowest timestep of each stage, for `diffusion.sampling.split_timesteps`."""
        return [stage.t_min for stage in self.stages]

    @property
    def with_exits(self) -> set[int]:
        """The numbers of the networks that are early-exit models."""
        return {stage.network for stage in self.stages if stage.saving.exit_layer is not None}

    @property
    def forecasts_noise(self) -> bool:
        """Whether a stage forecasts the predicted noise, which all networks must then predict."""
        return any(stage.saving.correct_every > 1 or stage.saving.hold_every > 1 for stage in self.stages)

    @property
    def saves(self) -> bool:
        """Whether a stage has steps of two kinds."""
        return any(stage.saving.described.keys() - {"exit_layer"} for stage in self.stages)

    def described(self, num_timesteps: int) -> list[dict[str, Any]]:
        """The stages as plain values, for the record of a run."""
        highest = [num_timesteps - 1, *(stage.t_min - 1 for stage in self.stages[:-1])]
        described = []
        for stage, t_max in zip(self.stages, highest, strict=True):
            about: dict[str, Any] = {"network": stage.network, "t_min": stage.t_min, "t_max": t_max}
            about["guidance_scale"] = stage.guidance_scale
            interval = {name: getattr(stage, name) for name in ("guidance_t_min", "guidance_t_max")}
            if stage.guidance_scale:  # without guidance the interval has no effect
                about |= {name: t for name, t in interval.items() if t is not None}
            about |= stage.saving.described
            if stage.cheap is not None:
                about["correct_with"] = stage.cheap
            described.append(about)
        return described

    def switched_at(self, t_switch: int) -> Plan:
        """The plan with the second of its two stages at every t <= t_switch."""
        first, second = self.stages
        return replace(self, stages=[replace(first, t_min=t_switch + 1), second])

    def check_length(self, num_timesteps: int) -> None:
        """Raises InputError unless the stages cover the networks' number of timesteps."""
        if self.num_timesteps not in (None, num_timesteps):
            raise InputError(
                f"{self.source}: the stages begin at t = {self.num_timesteps - 1}, but the networks at t = "
                f"{num_timesteps - 1}"
            )
        if (t_switch := self.stages[0].t_min - 1) >= num_timesteps:
            raise InputError(f"--t_switch {t_switch} is out of range, wanted -1..{num_timesteps - 1}")


def one_stage(settings: RunSettings, guidance_t_min: int | None = None, guidance_t_max: int | None = None) -> Plan:
    """One network at all timesteps."""
    assert settings.checkpoint_path is not None, "neither a network nor stages"
    files = [(settings.checkpoint_path, settings.config_path)]
    scale = settings.guidance_scale
    return Plan(files, [PlannedStage(0, 0, scale, "--guidance_scale", guidance_t_min, guidance_t_max)])


def stages_described(described: Sequence[Any], folder: Path) -> list[PlannedStage]:
    """The stages that `Plan.described` describes. Raises InputError, which names the folder, for anything else."""
    where, stages = f"{folder}: report/run.json", []
    for about in described:
        if not isinstance(about, dict):
            raise InputError(f"{where} does not describe stages")
        known = build(_Described, about, f"{where}: stages")
        guidance = known.guidance_scale, "--guidance_scale", known.guidance_t_min, known.guidance_t_max
        saving = SavingSettings(**known.described)
        stages.append(PlannedStage(known.network, known.t_min, *guidance, saving, known.correct_with))
    return stages


@dataclass(frozen=True, kw_only=True)
class _Described(SavingSettings):
    """An item of `Plan.described`."""

    network: int
    t_min: int
    t_max: int
    guidance_scale: float
    guidance_t_min: int | None = None
    guidance_t_max: int | None = None
    correct_with: int | None = None


def in_every_stage(saving: SavingSettings) -> SavingSettings:
    """The part of the flags that also applies to stages before the last: reuse, which works for any network."""
    return replace(saving, correct_every=1, correct_order=None, hold_every=1, hold_order=None, exit_layer=None)


def plan_of(settings: SamplerSettings) -> Plan:
    """The plan from the flags or from a file of stages. With --t_switch auto the switch is only a placeholder.

    Raises InputError for a wrong file of stages.
    """
    if settings.stages is not None:
        return _plan_of_file(settings.stages, settings)
    interval, saving = (settings.guidance_t_min, settings.guidance_t_max), settings.saving
    if settings.checkpoint_path_late is None:
        plan = one_stage(settings, *interval)
        return replace(plan, stages=[replace(plan.stages[0], saving=saving)])
    assert settings.checkpoint_path is not None, "--checkpoint_path_late without --checkpoint_path"
    point = settings.logsnr_switch
    early = settings.checkpoint_path, settings.config_path
    late = settings.checkpoint_path_late, settings.config_path_late
    lowest = settings.t_switch + 1 if isinstance(settings.t_switch, int) else 0
    scale = settings.guidance_scale if settings.guidance_scale_late is None else settings.guidance_scale_late
    return Plan(
        [early, late],
        [
            PlannedStage(0, lowest, settings.guidance_scale, "--guidance_scale", *interval, in_every_stage(saving)),
            PlannedStage(
                *(1, 0, scale, "--guidance_scale_late", *interval, saving, 0 if saving.correct_every > 1 else None)
            ),
        ],
        source=f"--t_switch {settings.t_switch}" if point is None else f"--logsnr_switch {point:g}",
    )


def _plan_of_file(path: Path, settings: SamplerSettings) -> Plan:
    content = read_stages(path)
    used = [(stage.checkpoint_path, stage.config_path) for stage in content.stages]
    cheap = [stage.cheap or used[0] if stage.correct_every > 1 else None for stage in content.stages]
    # The last network is that of a stage: its noise schedule is the sampler's.
    files = list(dict.fromkeys([*(file for file in cheap if file and file not in used), *used]))
    if settings.offload and len(files) == 1:
        raise InputError(f"--offload needs several networks; {path} names only one")
    stages = []
    for n, (file, other, stage) in enumerate(zip(used, cheap, content.stages, strict=True), 1):
        if file == other:
            raise InputError(
                f"{path}: stages {n}: correct_every needs a second, cheaper network; name it in correct_with"
            )
        scale, option = stage.guidance_scale, f"{path}: guidance_scale"
        if scale is None:
            scale, option = settings.guidance_scale, "--guidance_scale"
        interval = {
            name: getattr(settings if getattr(stage, name) is None else stage, name)
            for name in ("guidance_t_min", "guidance_t_max")
        }
        try:
            stages.append(
                PlannedStage(
                    files.index(file),
                    stage.t_min,
                    scale,
                    option,
                    **interval,
                    saving=stage.saving if stage.described else in_every_stage(settings.saving),
                    cheap=None if other is None else files.index(other),
                )
            )
        except InputError as error:
            raise InputError(f"{path}: stages {n}: {error}") from None
    return Plan(files, stages, content.stages[0].t_max + 1, content.calibration, str(path))


def read_stages(path: Path) -> StageFile:
    """Read a file of stages. Its paths are returned relative to the working folder.

    Raises InputError for unknown keys, values of the wrong type, stages that overlap or leave gaps, and missing files.
    """
    content = build(StageFile, read_mapping(path, "stages", list), str(path))
    stages = []
    for n, stage in enumerate(content.stages, 1):
        paths = {name: getattr(stage, name) for name in PATHS}
        paths = {name: path.parent / given for name, given in paths.items() if given is not None}
        for name, file in paths.items():
            if not (file.is_file() if "config" in name else file.exists()):
                fault = "is a folder" if file.is_dir() else "no such file"
                raise InputError(f"{path}: stages {n}: {name} {file}: {fault}")
        stages.append(replace(stage, **paths))
    return replace(content, stages=tuple(stages))


def is_calibration(path: Path) -> bool:
    """Whether the file was written by a calibration, which may then replace it."""
    try:
        return isinstance(read_mapping(path, "stages", list).get("calibration"), dict)
    except InputError:
        return False


def write_stages(path: Path, content: StageFile) -> None:
    """Write a file of stages, with paths relative to its folder so that the folder can be moved."""

    def relative(file: Path) -> Path:
        file = file.parent.resolve() / file.name
        try:
            return Path(Path(os.path.relpath(file, path.parent.resolve())).as_posix())
        except ValueError:  # on another drive of Windows
            return file

    def seen_from_there(stage: StageEntry) -> StageEntry:
        paths = {name: getattr(stage, name) for name in PATHS}
        moved: dict[str, Any] = {name: relative(file) for name, file in paths.items() if file is not None}
        return replace(stage, **moved)

    def short(stage: StageEntry) -> dict[str, Any]:
        without_effect = {f.name for f in fields_of(SavingSettings)} - stage.described.keys()
        return {name: value for name, value in plain(stage).items() if name not in without_effect}

    written = _stated(plain(content)) | {"stages": [_stated(short(seen_from_there(stage))) for stage in content.stages]}
    with replacing(path) as temporary:
        temporary.write_text(yaml.dump(written, Dumper=_PlainDumper, sort_keys=False), encoding="utf-8")


def _stated(value: Any) -> Any:
    """Nested plain values without None."""
    if isinstance(value, dict):
        return {key: _stated(item) for key, item in value.items() if item is not None}
    return [_stated(item) for item in value] if isinstance(value, list) else value


class _PlainDumper(yaml.SafeDumper):  # type: ignore[misc]  # yaml ships no types
    """Writes repeated values in full, because the reader refuses aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True
