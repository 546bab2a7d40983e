"""Standard output and error that never end the work, whatever becomes of who reads them."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, TextIO


class _Lasting(io.FileIO):
    """A descriptor that leads nowhere once it cannot be written any more."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError:  # the reader went away, or the terminal; or a log's disk is full
            _lead_nowhere(self.fileno())
            return len(data)


@contextmanager
def lasting_streams() -> Iterator[None]:
    """Within the block standard output and error exist and take everything.

    Where they were closed (2>&-, pythonw), or when their reader goes away (| head -1), what is written is lost, in
    silence. Characters that they cannot encode are written as escapes.
    """
    for descriptor in range(3):  # or the next file that is opened, a checkpoint perhaps, would be standard error
        try:
            os.fstat(descriptor)
        except OSError:
            _lead_nowhere(descriptor)
    before = sys.stdout, sys.stderr
    with ExitStack() as stack:
        sys.stdout, sys.stderr = (stack.enter_context(_lasting(stream)) for stream in before)
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before


@contextmanager
def _lasting(stream: TextIO | None) -> Iterator[TextIO]:
    if stream is None:
        with open(os.devnull, "w", encoding="utf-8") as nowhere:  # noqa: PTH123
            yield nowhere
        return
    if not isinstance(stream, io.TextIOWrapper):  # a notebook's, or a test's: they have their own ways
        yield stream
        return
    errors = "backslashreplace" if stream.errors == "strict" else stream.errors
    raw = getattr(stream.buffer, "raw", stream.buffer)
    if type(raw) is not io.FileIO:  # made already, or the console of Windows
        errors_before = stream.errors
        stream.reconfigure(errors=errors)
        try:
            yield stream
        finally:
            stream.reconfigure(errors=errors_before)
        return
    with suppress(OSError):
        stream.flush()
    lasting = _Lasting(raw.fileno(), "w", closefd=False)
    buffer = lasting if raw is stream.buffer else io.BufferedWriter(lasting)  # python -u has no buffer
    kept = {name: getattr(stream, name) for name in ("encoding", "line_buffering", "write_through")}
    ours = io.TextIOWrapper(buffer, errors=errors, **kept)
    try:
        yield ours
    finally:
        ours.flush()


def _lead_nowhere(descriptor: int) -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    if nowhere == descriptor:  # it was closed, and thus the next to be opened
        os.set_inheritable(nowhere, True)
        return
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


def say_in_handler(text: str) -> None:
    """On standard error, from a signal handler: print may be what the signal interrupted."""
    with suppress(OSError, ValueError):  # none that can be written, or a test's
        os.write(sys.stderr.fileno(), text.encode())
