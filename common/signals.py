"""Signals that ask a process to end."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from common.startup import end_at_once

SAME_WISH = 1.0  # seconds in which further signals are ignored: a terminal and a launcher may both send one


class Stopped(KeyboardInterrupt):
    """A signal asked the process to end; like KeyboardInterrupt for Ctrl-C."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


def number_of(interrupt: KeyboardInterrupt) -> int:
    """The signal that was received."""
    return getattr(interrupt, "number", signal.SIGINT)


@contextmanager
def on_signals(numbers: Iterable[int], handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
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


def interrupting(ends_process: bool) -> Callable[[int, FrameType | None], None]:
    """A handler that raises Stopped, or KeyboardInterrupt for Ctrl-C; once for signals in quick succession.

    So a second signal does not disturb the clean-up after the first. A forked process ends at once. ends_process: end
    at once during an import too, because modules such as numpy turn the exception into other errors, or drop it.
    """
    process, last = os.getpid(), -SAME_WISH

    def handler(number: int, frame: FrameType | None) -> None:
        nonlocal last
        if os.getpid() != process:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if time.monotonic() < last + SAME_WISH:
            return
        last = time.monotonic()
        if ends_process and _importing(frame):
            with suppress(Exception):  # the signal may have interrupted a print
                sys.stdout.flush()
            end_at_once(number)
        raise KeyboardInterrupt if number == signal.SIGINT else Stopped(number)

    return handler


def _importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def ignore(numbers: Iterable[int]) -> None:
    """Ignore these signals from now on, for the last steps of a process."""
    if threading.current_thread() is threading.main_thread():
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
