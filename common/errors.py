"""Errors a user can cause, and how a script ends on one."""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path


class InputError(ValueError):
    """Something the user gave does not fit; the message says what came, what was wanted, what to do."""


def command(main: Callable[[Sequence[str] | None], None]) -> Callable[[Sequence[str] | None], None]:
    """Decorate a script's `main`: what a user can cause ends in one line on stderr and status 2.

    Everything else keeps its traceback: it is ours to mend.
    """
    script = Path(main.__code__.co_filename).name

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> None:
        try:
            main(argv)
        except InputError as error:
            # One that a loading process met comes with that process's traceback before it.
            fail(script, str(error).rpartition("InputError: ")[2])
        except OSError as error:  # no permission, disk full, a file that went away
            fail(script, f"{error.filename}: {error.strerror}" if error.filename else str(error))
        except KeyboardInterrupt:
            print(f"\n{script}: interrupted", file=sys.stderr)
            raise SystemExit(130) from None
        except (MemoryError, RuntimeError) as error:
            # torch's own error has a type on accelerators, but only a text on the CPU.
            texts = ("can't allocate memory", "not enough memory", "DataLoader worker (pid")
            out_of_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
            if lost_another_process(error):
                fail(
                    script,
                    "another process of this run ended, or cannot be reached any more; what it said stands above or "
                    f"in its own log ({str(error).splitlines()[0]:.100})",
                )
            if not out_of_memory and not any(text in str(error) for text in texts):
                raise
            fail(script, "out of memory; try a smaller --batch_size, or fewer --num_workers")

    return run


def lost_another_process(error: BaseException) -> bool:
    """Whether torch.distributed gave up on the processes torchrun started beside this one."""
    distributed = any(kind.__name__ == "DistError" for kind in type(error).__mro__)
    return int(os.environ.get("WORLD_SIZE", 1)) > 1 and (distributed or "gloo" in str(error))


def fail(script: str, message: str) -> None:
    """End with one line and status 2. Of several processes that torchrun started process 0 speaks at once.

    The others wait a little: mostly they met the same as process 0, and torchrun ends them meanwhile.
    """
    if process := int(os.environ.get("RANK", 0)):
        time.sleep(3)
        script = f"{script}: process {process}"
    print(f"{script}: {' '.join(message.split())}", file=sys.stderr, flush=True)
    raise SystemExit(2) from None
