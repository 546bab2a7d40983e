"""Signals that ask a process to end."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

# Sent by a stopping service, a closing terminal, and a queue before its time limit. Windows only has the first.
ASKING_TO_END = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name))
SAME_WISH = 1.0  # seconds in which further signals are ignored: a terminal and a launcher may both send one


class Stopped(KeyboardInterrupt):
    """A signal asked the process to end; like KeyboardInterrupt for Ctrl-C."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


def status_of(interrupt: KeyboardInterrupt) -> int:
    """The exit status of a script: 128 + the signal number, as in shells."""
    return 128 + getattr(interrupt, "number", signal.SIGINT)


@contextmanager
def on_signals(numbers: Iterable[int], handler: Callable[[int, object], None]) -> Iterator[None]:
    """A context in which `handler` handles the signals, except ignored ones (as under nohup).

    Other threads than the main thread cannot set handlers, so nothing changes there. Handlers from outside Python stay.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in numbers:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, handler_before in before.items():
            if signal.getsignal(number) is handler:  # otherwise `ignore` replaced it
                signal.signal(number, handler_before)


def interrupting() -> Callable[[int, object], None]:
    """A handler that raises Stopped, or KeyboardInterrupt for Ctrl-C; once for signals in quick succession.

    So a second signal does not disturb the clean-up after the first. A forked process ends at once.
    """
    process, last = os.getpid(), -SAME_WISH

    def handler(number: int, frame: object) -> None:
        nonlocal last
        if os.getpid() != process:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if time.monotonic() < last + SAME_WISH:
            return
        last = time.monotonic()
        raise KeyboardInterrupt if number == signal.SIGINT else Stopped(number)

    return handler


def ignore(numbers: Iterable[int]) -> None:
    """Ignore these signals from now on, for the last steps of a process."""
    if threading.current_thread() is threading.main_thread():
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
