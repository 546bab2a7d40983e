"""The networks of a sampling run and their turns, from the command line or from a schedule file. No torch in here."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import InputError
from generation.schedule_file import read_schedule


class Turn(NamedTuple):
    network: int  # which of the files runs
    guidance_scale: float
    option: str  # what said the scale, for messages


class Turns(NamedTuple):
    """Who runs when, from the noisiest timesteps to the cleanest."""

    files: list[tuple[Path, Path | None]]  # of each network, in the order they first run: weights, description
    turns: list[Turn]
    switches: list[int]  # where the next turn begins: those of `diffusion.sampling.SwitchingDenoiser`
    calibration: dict[str, Any]  # what a schedule file says of where it came from

    def names(self) -> list[str]:
        """Of the networks, for people."""
        if len(self.files) == 1:
            return ["backbone"]
        if [turn.network for turn in self.turns] == [0, 1]:
            return ["shallow", "full"]
        return [f"network {n}" for n in range(1, len(self.files) + 1)]


def turns_of(args: argparse.Namespace) -> Turns:
    """What sampler.py's options say. With --schedule the turns become args.stages, as plain values for the record.

    As long as --t_switch is "auto" the networks are right, and the switch is to be settled.
    """
    if args.schedule is None:
        files = [(args.checkpoint_path, args.config_path), (args.checkpoint_path_late, args.config_path_late)]
        turns = [Turn(0, args.guidance_scale, "--guidance_scale")]
        if args.t_switch is None:
            return Turns(files[:1], turns, [], {})
        return Turns(files, [*turns, Turn(1, args.guidance_scale_late, "--guidance_scale_late")], [args.t_switch], {})
    schedule = read_schedule(args.schedule)
    used = [(stage.checkpoint_path, stage.config_path) for stage in schedule.stages]
    files = list(dict.fromkeys(used))
    if args.offload and len(files) == 1:
        raise InputError(f"--offload keeps idle networks away; {args.schedule} names one alone")
    turns = [
        Turn(files.index(file), args.guidance_scale, "--guidance_scale")
        if stage.guidance_scale is None
        else Turn(files.index(file), stage.guidance_scale, f"{args.schedule}: guidance_scale")
        for file, stage in zip(used, schedule.stages, strict=True)
    ]
    args.stages = [
        {"network": turn.network, "t_min": stage.t_min, "t_max": stage.t_max, "guidance_scale": turn.guidance_scale}
        for turn, stage in zip(turns, schedule.stages, strict=True)
    ]
    return Turns(files, turns, schedule.switches, schedule.calibration or {})


def check_length(args: argparse.Namespace, num_timesteps: int) -> None:
    """Raises InputError unless the switch, or the schedule, is of the networks' own noise schedule."""
    last = num_timesteps - 1
    if args.schedule is None:
        if args.t_switch not in (None, "auto") and args.t_switch > last:
            raise InputError(f"--t_switch {args.t_switch} is out of range, wanted -1..{last}")
    elif args.stages[0]["t_max"] != last:
        raise InputError(f"{args.schedule}: stages from t = {args.stages[0]['t_max']} on, the networks' are {last}..0")
