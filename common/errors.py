"""Errors that a user can cause, and how scripts report them."""

from __future__ import annotations

import errno
import functools
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import NoReturn, ParamSpec

from common.signals import ASKING_TO_END, Stopped, ignore, interrupting, on_signals, status_of
from common.streams import lasting_streams

P = ParamSpec("P")
NO_ROOM = {getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EFBIG") if hasattr(errno, name)}
# Packages that not every installation has, and the optional dependencies of pyproject.toml that bring them.
EXTRAS = {"diffusers": "latents", "huggingface_hub": "latents", "scipy": "eval", "torch_fidelity": "eval"}
ENDING = (*ASKING_TO_END, signal.SIGINT)

_running: ContextVar[ExitStack | None] = ContextVar("running", default=None)  # the running command


class InputError(ValueError):
    """Wrong input by the user. The message names the input, the expected input and the remedy."""


class WriteError(InputError):
    """A file could not be written; the previous file is unchanged. The message names the disk.

    remedy: the first step of the user, to which the caller adds how to continue.
    """

    def __init__(self, path: Path, number: int):
        super().__init__(f"{path}: could not be written ({os.strerror(number)}; the disk at {mount_point(path)})")
        self.remedy = "make room" if number in NO_ROOM else "remove the cause"


def mount_point(path: Path) -> Path:
    """The mount point of the disk of a file."""
    return next(folder for folder in path.absolute().parents if os.path.ismount(folder) or folder == folder.parent)


@contextmanager
def writing(path: Path, *also: Path) -> Iterator[None]:
    """A context that raises WriteError if writing `path` or a file in `also` fails.

    Errors about other files, such as files that the block reads, are unchanged.
    """
    try:
        yield
    except Exception as error:
        number = _errno_of(error, {None, *map(str, (path, *also))})
        if number is None or isinstance(error, InputError):
            raise
        raise WriteError(path, number) from None


def _errno_of(error: Exception, names: set[str | None]) -> int | None:
    """The errno of the failed system call. torch wraps it in another error, safetensors only has a text."""
    for each in (error, error.__context__):
        if isinstance(each, OSError) and each.errno is not None:
            return each.errno if each.filename is None or os.fspath(each.filename) in names else None
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def at_end_of_command(work: Callable[[], object]) -> None:
    """Call `work` when the running command ends, for any reason; never, if no command runs."""
    if (running := _running.get()) is not None:
        running.callback(work)


def command(main: Callable[P, None]) -> Callable[P, None]:
    """Decorator for a script's `main`: errors that a user can cause end in one line on stderr and status 2.

    Ctrl-C and the signals that ask a process to end give status 128 + their number. Output that cannot be written is
    dropped. All other errors keep their traceback, because they are bugs.
    """
    script = Path(main.__code__.co_filename).name

    ends_process = main.__module__ == "__main__"  # then signals are ignored in its last steps

    @functools.wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        with lasting_streams(), on_signals(ENDING, interrupting()):  # to the last word of the `except` below
            try:
                with ExitStack() as stack:
                    token = _running.set(stack)
                    stack.callback(_running.reset, token)
                    _guarded(functools.partial(main, *args, **kwargs), script)
            except SystemExit:
                if ends_process:
                    ignore(ENDING)
                raise
            except KeyboardInterrupt as interrupt:
                if ends_process:
                    ignore(ENDING)
                if int(os.environ.get("RANK", 0)) == 0:
                    said = f"stopped ({interrupt})" if isinstance(interrupt, Stopped) else "interrupted"
                    beside = "\n" if sys.stderr.isatty() else ""  # ends the line with ^C or a progress bar
                    print(f"{beside}{script}: {said}", file=sys.stderr, flush=True)
                raise SystemExit(status_of(interrupt)) from None

    return run


def _guarded(main: Callable[[], None], script: str) -> None:
    """Call main, and report errors that a user can cause with `fail`."""
    try:
        main()
    except WriteError as error:
        fail(script, f"{error}; earlier files are unchanged: {error.remedy}, then give the same command again")
    except InputError as error:
        # The error of a loading process starts with the traceback of that process.
        fail(script, str(error).rpartition("InputError: ")[2])
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        fail(script, f"{package} is not installed, but this command needs it: pip install -e '.[{EXTRAS[package]}]'")
    except OSError as error:  # no permission, or a file was removed
        advice = "; make room, then give the same command again" if error.errno in NO_ROOM else ""
        fail(script, (f"{error.filename}: {error.strerror}" if error.filename else str(error)) + advice)
    except (MemoryError, RuntimeError) as error:
        # On accelerators torch raises a type of its own; on the CPU only the text identifies the error.
        texts = ("can't allocate memory", "not enough memory", "DataLoader worker (pid")
        out_of_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
        if lost_another_process(error):
            fail(
                script,
                "another process of this run ended or cannot be reached; its message is above or "
                f"in its own log ({str(error).splitlines()[0]:.100})",
            )
        if not out_of_memory and not any(text in str(error) for text in texts):
            raise
        fail(script, "out of memory; try a smaller --batch_size, or fewer --num_workers")


def lost_another_process(error: BaseException) -> bool:
    """Whether torch.distributed lost another process of the same torchrun."""
    distributed = any(kind.__name__ == "DistError" for kind in type(error).__mro__)
    return int(os.environ.get("WORLD_SIZE", 1)) > 1 and (distributed or "gloo" in str(error))


def fail(script: str, message: str) -> NoReturn:
    """End with one line and status 2.

    Under torchrun process 0 prints at once. The others wait a little, because they mostly have the same error, and
    torchrun ends them in the meantime.
    """
    if process := int(os.environ.get("RANK", 0)):
        time.sleep(3)
        script = f"{script}: process {process}"
    print(f"{script}: {' '.join(message.split())}", file=sys.stderr, flush=True)
    raise SystemExit(2) from None
