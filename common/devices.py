"""Where the work runs, and how fast it went."""

from __future__ import annotations

import time

import torch

from common.errors import InputError


def pick_device(name: str) -> torch.device:
    """`auto` takes CUDA, then MPS, then the CPU. Raises InputError for a device that is not there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, there in available.items() if there))
    kind, _, index = name.partition(":")
    if kind not in available or (index and not index.isdecimal()):
        raise InputError(f"--device {name}: choose auto, cpu, cuda, cuda:N or mps")
    if not available[kind]:
        raise InputError(f"--device {name}: this machine or this torch has no {kind}; use --device auto")
    count = torch.cuda.device_count() if kind == "cuda" else 1
    if index and int(index) >= count:
        raise InputError(f"--device {name}: there are {count} such devices, counted from 0")
    return torch.device(name)


def device_name(device: torch.device) -> str:
    """What the hardware is called: "cpu", "mps", "NVIDIA H100 80GB HBM3"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


class Stopwatch:
    """Seconds of finished work on a device: `with stopwatch: ...` takes a lap."""

    def __init__(self, device: torch.device):
        self.device = device
        self.laps: list[float] = []

    @property
    def seconds(self) -> float:
        return sum(self.laps)

    def __enter__(self) -> Stopwatch:
        synchronize(self.device)
        self._start = time.perf_counter()
        return self

    def __exit__(self, *exc_info: object) -> None:
        synchronize(self.device)
        self.laps.append(time.perf_counter() - self._start)
