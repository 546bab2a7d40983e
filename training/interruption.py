"""End a run after the current step on a signal or a time limit."""

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
    status: int  # the exit status: 128 + the signal number, as in shells


SIGNALS = (*ASKING_TO_END, signal.SIGINT)
REASONS = (
    *(Reason(signal.Signals(number).name, 128 + number) for number in ASKING_TO_END),
    *(Reason("Ctrl-C", 130), Reason("--max_hours", 0)),
)
SIGTERM, MAX_HOURS = SIGNALS.index(signal.SIGTERM), len(SIGNALS)


class StopRequests:
    """A context that records signals and Ctrl-C instead of ending the process; a second Ctrl-C ends it.

    deadline: the time.monotonic() after which the run should also stop.
    """

    def __init__(self, deadline: float | None):
        self.deadline = deadline
        self.signalled: set[int] = set()  # received signals of SIGNALS
        self.reason: Reason | None = None  # the reason to stop early, once all processes have it
        self._process = os.getpid()

    def __enter__(self) -> StopRequests:
        self._handling = ExitStack()
        self._handling.enter_context(on_signals(SIGNALS, self._on_signal))
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._handling.close()

    def _on_signal(self, number: int, frame: object) -> None:
        if os.getpid() != self._process:  # in a newly forked loading process
            return
        if number == signal.SIGINT and number in self.signalled:
            raise KeyboardInterrupt
        self.signalled.add(number)
        if is_main():
            hint = "; press Ctrl-C again to stop at once" if number == signal.SIGINT else ""
            say_in_handler(f"\nfinishing the step, then saving{hint}\n")

    def asked(self) -> list[float]:
        """For each of REASONS 1 if this process should stop for it, else 0."""
        late = self.deadline is not None and time.monotonic() >= self.deadline
        return [*(float(number in self.signalled) for number in SIGNALS), float(late)]
