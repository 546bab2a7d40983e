"""Signals that end a script while it still imports its modules.

Each script imports this first of all, so it imports little itself: until then Ctrl-C is a traceback.
"""

from __future__ import annotations

import _signal as signal  # type: ignore[import-not-found]  # builtin; the module around it takes 3 ms to import
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

# Sent by a stopping service, a closing terminal, and a queue before its time limit. Windows only has the first.
NAMES: dict[int, str] = {
    getattr(signal, name): name for name in ("SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)
}
ASKING_TO_END = tuple(NAMES)
ENDING: tuple[int, ...] = (*ASKING_TO_END, signal.SIGINT)


def end_in_one_line() -> None:
    """From now on a signal or Ctrl-C ends the process with one line and status 128 + the signal number.

    Only for the main program, before its `main` has anything to clean up. Ignored signals stay ignored (nohup).
    """
    for number in ENDING:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, end_at_once)


def end_at_once(number: int, frame: object = None) -> NoReturn:
    try:
        os.write(2, last_line(os.path.basename(sys.argv[0]), number).encode(errors="backslashreplace"))  # noqa: PTH119
    finally:
        os._exit(128 + number)  # even if standard error is closed


def last_line(script: str, number: int) -> str:
    """The line that a script ended by a signal prints; only process 0 of torchrun prints it."""
    if int(os.environ.get("RANK", 0)):
        return ""
    said = f"stopped ({NAMES[number]})" if number in NAMES else "interrupted"
    beside = "\n" if os.isatty(2) else ""  # ends the line with ^C or a progress bar
    return f"{beside}{script}: {said}\n"
