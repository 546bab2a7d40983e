"""Ending a run in good order: signals and a time limit ask for it, the loop does it when the step is done."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import NamedTuple

from common.distributed import is_main


class Reason(NamedTuple):
    name: str
    status: int  # what the script ends with: 128 + the signal, as shells have it


REASONS = (Reason("SIGTERM", 143), Reason("Ctrl-C", 130), Reason("--max_hours", 0))
SIGTERM, CTRL_C, MAX_HOURS = range(len(REASONS))


class StopRequests:
    """Within the block SIGTERM and Ctrl-C ask for an end instead of making one; a second Ctrl-C makes it.

    deadline: of time.monotonic(), when to ask as well.
    """

    def __init__(self, deadline: float | None):
        self.deadline = deadline
        self.signalled: set[int] = set()

    def __enter__(self) -> StopRequests:
        self._before = {}
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            self._before = {s: signal.signal(s, self._on_signal) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: object) -> None:
        if number == signal.SIGINT and CTRL_C in self.signalled:
            raise KeyboardInterrupt
        self.signalled.add(CTRL_C if number == signal.SIGINT else SIGTERM)
        if is_main():  # not by print: the signal may have come in the middle of one
            hint = "; Ctrl-C again ends at once" if number == signal.SIGINT else ""
            os.write(2, f"\nfinishing the step, then saving{hint}\n".encode())

    def asked(self) -> list[float]:
        """For each of REASONS 1 or 0: whether this process was asked to stop for it."""
        late = self.deadline is not None and time.monotonic() >= self.deadline
        return [float(i in self.signalled or (i == MAX_HOURS and late)) for i in range(len(REASONS))]
