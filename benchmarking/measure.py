"""Times, rates and memory of work on a device."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from common.devices import DTYPES, device_name, in_hardware, synchronize
from diffusion.sampling import Denoiser


def describe_machine(device: torch.device) -> dict[str, Any]:
    """The device, the CPU or GPU and the torch version of the measurements."""
    about: dict[str, Any] = {"device": str(device), "torch": str(torch.__version__), "name": device_name(device)}
    if device.type != "cuda":
        about |= {"cores": torch.multiprocessing.cpu_count(), "threads": torch.get_num_threads()}
        about["instructions"] = torch.backends.cpu.get_cpu_capability()
    about["half precision in hardware"] = [name for name in ("bf16", "fp16") if in_hardware(name, device)]
    return about


class MatrixProduct:
    """A product of two large square matrices, for the highest speed of a device in a precision."""

    def __init__(self, device: torch.device, precision: str):
        self.side = 8192 if device.type == "cuda" else 2048
        if not in_hardware(precision, device):
            self.side = 512  # smaller: an emulation may take minutes, and its rate does not depend on the size
        shape = (2, self.side, self.side)
        self.a, self.b = torch.randn(shape, device=device).to(DTYPES[precision])

    @property
    def flops(self) -> int:
        return 4 * 2 * self.side**3

    def __call__(self) -> None:
        for _ in range(4):
            self.a @ self.b


class CallTimer:
    """Measures the time of calls of denoisers, on CUDA without waiting for them."""

    def __init__(self, device: torch.device):
        self.device = device
        self._marks: list[tuple[Any, Any]] = []

    def of(self, denoiser: Denoiser) -> Denoiser:
        """The denoiser with timed calls."""

        def timed(x_t: Tensor, t: int, y: Tensor | None) -> Tensor:
            before = self._mark()
            output = denoiser(x_t, t, y)
            self._marks.append((before, self._mark()))
            return output

        return timed

    def _mark(self) -> Any:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event
        synchronize(self.device)
        return time.perf_counter()

    def take_seconds(self) -> float:
        """The seconds of all calls since the last reading."""
        synchronize(self.device)
        seconds: float
        if self.device.type == "cuda":
            seconds = sum(before.elapsed_time(after) for before, after in self._marks) / 1000
        else:
            seconds = sum(after - before for before, after in self._marks)
        self._marks.clear()
        return seconds
