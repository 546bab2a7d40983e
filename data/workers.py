"""Worker processes that read and decode images: their open files, their signals and their end."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing import parent_process
from multiprocessing.connection import wait

from common.errors import InputError
from common.signals import ASKING_TO_END

if sys.platform != "win32":
    import resource

SPARE_FILES = 16  # for other uses in this process
ENDING = {signal.SIGINT, *ASKING_TO_END}


def check_open_files(num_workers: int, per_worker: int) -> None:
    """Raises InputError if this process may not open `per_worker` files for each worker.

    Raises the limit first, as far as the system allows. With too few files the processes would wait for each other for
    ever.
    """
    wanted = num_workers * per_worker + SPARE_FILES
    if num_workers == 0 or _can_open(wanted) == wanted:
        return
    limit = ""
    if sys.platform != "win32":
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = soft + wanted if hard == resource.RLIM_INFINITY else min(soft + wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        limit = f" of {most} (ulimit -n)"
    if (possible := _can_open(wanted)) < wanted:
        fewer = max(0, (possible - SPARE_FILES) // per_worker)
        raise InputError(
            f"--num_workers {num_workers} needs {wanted} more open files, but the limit{limit} leaves {possible}; "
            f"raise it, or give --num_workers {fewer}"
        )


def _can_open(wanted: int) -> int:
    """The number of further files that this process can open, at most `wanted`."""
    with ExitStack() as opened:
        for count in range(wanted):
            try:
                opened.callback(os.close, os.open(os.devnull, os.O_RDONLY))
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE):
                    raise
                return count
    return wanted


@contextmanager
def signals_held() -> Iterator[None]:
    """A context that starts processes which get no Ctrl-C or other ending signal before they call `end_with_parent`,
    because they inherit handlers of the parent.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent() -> None:
    """In a process of a pool: ignore Ctrl-C, and end with the parent.

    Otherwise it would wait for ever for the next task after the parent was killed.
    """
    for number in ENDING:
        if callable(signal.getsignal(number)):  # not a signal that is ignored, as under nohup
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = parent_process()
    assert parent is not None, "a process that nobody started as one of a pool"
    wait([parent.sentinel])
    os._exit(1)
