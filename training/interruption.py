"""Ending a run in good order: signals and a time limit ask for it, the loop does it when the step is done."""

from __future__ import annotations

import os
import signal
import time
from contextlib import ExitStack
from typing import NamedTuple

from common.distributed import is_main
from common.signals import ASKING_TO_END, on_signals
from common.streams import say_in_handler


class Reason(NamedTuple):
    name: str
    status: int  # what the script ends with: 128 + the signal, as shells have it


SIGNALS = (*ASKING_TO_END, signal.SIGINT)
REASONS = (
    *(Reason(signal.Signals(number).name, 128 + number) for number in ASKING_TO_END),
    *(Reason("Ctrl-C", 130), Reason("--max_hours", 0)),
)
SIGTERM, CTRL_C, MAX_HOURS = SIGNALS.index(signal.SIGTERM), SIGNALS.index(signal.SIGINT), len(SIGNALS)


class StopRequests:
    """Within the block signals and Ctrl-C ask for an end instead of making one; a second Ctrl-C makes it.

    deadline: of time.monotonic(), when to ask as well.
    """

    def __init__(self, deadline: float | None):
        self.deadline = deadline
        self.signalled: set[int] = set()  # of SIGNALS
        self.reason: Reason | None = None  # why the run ends before its last step, once all processes know
        self._process = os.getpid()

    def __enter__(self) -> StopRequests:
        self._handling = ExitStack()
        self._handling.enter_context(on_signals(SIGNALS, self._on_signal))
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._handling.close()

    def _on_signal(self, number: int, frame: object) -> None:
        if os.getpid() != self._process:  # a loading process that has just been forked
            return
        if number == signal.SIGINT and number in self.signalled:
            raise KeyboardInterrupt
        self.signalled.add(number)
        if is_main():
            hint = "; Ctrl-C again ends at once" if number == signal.SIGINT else ""
            say_in_handler(f"\nfinishing the step, then saving{hint}\n")

    def asked(self) -> list[float]:
        """For each of REASONS 1 or 0: whether this process was asked to stop for it."""
        late = self.deadline is not None and time.monotonic() >= self.deadline
        return [*(float(number in self.signalled) for number in SIGNALS), float(late)]
