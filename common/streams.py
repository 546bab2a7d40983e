"""Standard output and error streams that survive the end of their reader."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from typing import Any, TextIO


class _Lasting(io.FileIO):
    """A descriptor that is redirected to the null device after a failed write."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError:  # a closed pipe or terminal, or a full disk
            _lead_nowhere(self.fileno())
            return len(data)


@contextmanager
def lasting_streams() -> Iterator[None]:
    """A context in which writing to standard output and error never fails.

    Output to closed streams (2>&-, pythonw), or after the end of the reader (| head -1), is dropped. Characters
    outside the encoding are written as escapes.
    """
    for descriptor in range(3):  # else the next opened file, such as a checkpoint, would become standard error
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
    if not isinstance(stream, io.TextIOWrapper):  # a stream of a notebook or of a test
        yield stream
        return
    errors = "backslashreplace" if stream.errors == "strict" else stream.errors
    raw = getattr(stream.buffer, "raw", stream.buffer)
    if type(raw) is not io.FileIO:  # a nested call, or the Windows console
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
    if nowhere == descriptor:  # the descriptor was closed, so os.open returned it
        os.set_inheritable(nowhere, True)
        return
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


@contextmanager
def no_output() -> Iterator[None]:
    """A context in which everything that goes to standard output is dropped."""
    with _lasting(None) as nowhere, redirect_stdout(nowhere):
        yield


def say_in_handler(text: str) -> None:
    """Write to standard error from a signal handler, without print, which the signal may have interrupted."""
    with suppress(OSError, ValueError):  # a closed stream, or that of a test
        os.write(sys.stderr.fileno(), text.encode())
