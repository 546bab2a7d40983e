"""Errors a user can cause, and how a script ends on one."""

from __future__ import annotations

import functools
import sys
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
            fail(script, str(error))
        except OSError as error:  # no permission, disk full, a file that went away
            fail(script, f"{error.filename}: {error.strerror}" if error.filename else str(error))
        except KeyboardInterrupt:
            print(f"\n{script}: interrupted", file=sys.stderr)
            raise SystemExit(130) from None
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":  # torch's; not worth importing torch for
                raise
            fail(script, "the device ran out of memory; try a smaller --batch_size")

    return run


def fail(script: str, message: str) -> None:
    print(f"{script}: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2) from None
