"""Calls of the project's scripts that are made once, however often a measurement is begun again."""

from __future__ import annotations

import importlib
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.files import read_json, write_json

Flags = Mapping[str, Any]  # by their names; True stands for a flag without a value


def words_of(given: Sequence[object], flags: Flags) -> list[str]:
    """The command line. given: arguments without a flag."""
    words = list(map(str, given))
    for name, value in flags.items():
        values = value if isinstance(value, list | tuple) else () if value is True else (value,)
        words += [f"--{name}", *map(str, values)]
    return words


def slug(*words: object) -> str:
    """The words as a part of a file's name."""
    text = " ".join(map(str, words)).replace("++", "pp")
    return "_".join("".join(c if c.isalnum() or c == "." else " " for c in text).split())


def line_of(module: str, words: Sequence[str]) -> str:
    """The call as one would type it."""
    return f"python {f'-m {module}' if '.' in module else f'{module}.py'} {shlex.join(words)}"


class Runner:
    """Calls scripts, each with the same flags once: commands.json has the seconds of each, none while it runs."""

    def __init__(self, folder: Path):
        self.path = folder / "commands.json"
        self.seconds: dict[str, float | None] = read_json(self.path) if self.path.exists() else {}
        self.asked: dict[str, None] = {}  # in this run, done before or not

    def __call__(
        self, module: str, *given: object, going_on: Callable[[], Flags | None] | None = None, **flags: object
    ) -> None:
        """going_on: the flags in place of these where the same call was cut off; None if nothing is left to do."""
        line = line_of(module, words_of(given, flags))
        self.asked[line] = None
        if self.seconds.get(line) is not None:
            return
        now = going_on() if going_on and line in self.seconds else flags
        self._note(line, None)
        started = time.perf_counter()
        if now is None:
            print(f"done before: {line}", flush=True)
        else:
            call(module, words_of(given, now))
        self._note(line, time.perf_counter() - started)

    def began(self, module: str, **flags: object) -> bool:
        """Whether the same call was made before, to its end or not."""
        return line_of(module, words_of((), flags)) in self.seconds

    def _note(self, line: str, seconds: float | None) -> None:
        self.seconds[line] = seconds
        write_json(self.path, self.seconds)

    @property
    def seconds_in_all(self) -> float:
        """Of what this run asked for."""
        return sum(self.seconds[line] or 0 for line in self.asked)


def call(module: str, words: Sequence[str]) -> None:
    print(f"\n$ {line_of(module, words)}", flush=True)
    own, sys.argv = sys.argv, [f"{module}.py", *words]  # what scripts call themselves when they are stopped
    try:
        importlib.import_module(module).main(words)
    finally:
        sys.argv = own
