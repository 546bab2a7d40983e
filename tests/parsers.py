"""The parsers of all scripts, found by looking through the project's files."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from unittest import mock

ROOT = Path(__file__).parents[1]


class Command(NamedTuple):
    script: ModuleType
    words: tuple[str, ...]  # of its sub-command
    parser: argparse.ArgumentParser

    def __str__(self) -> str:
        return " ".join([self.script.__name__, *self.words])

    @property
    def options(self) -> list[argparse.Action]:
        """Those that take a value."""
        return [action for action in self.parser._actions if action.option_strings and action.nargs != 0]


class _Captured(Exception):
    pass


def _scripts() -> Iterator[ModuleType]:
    """The module that has a script's main, which may be another than the one that is typed."""
    for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if not name.startswith("tests.") and 'if __name__ == "__main__":' in path.read_text("utf-8"):
            module = importlib.import_module(name)
            if hasattr(module, "main"):
                yield sys.modules[module.main.__module__]


def _parser_of(script: ModuleType) -> argparse.ArgumentParser:
    """As it is when the script asks it to parse."""

    def capture(self: argparse.ArgumentParser, *_: object) -> None:
        raise _Captured(self)

    with mock.patch.object(argparse.ArgumentParser, "parse_args", capture):
        try:
            script.parse_settings([])
        except _Captured as captured:
            return captured.args[0]
    raise AssertionError(f"{script.__name__}.parse_settings parses nothing")


def commands() -> list[Command]:
    """Every script, each of its sub-commands by itself."""
    found = []
    for script in dict.fromkeys(_scripts()):
        parser = _parser_of(script)
        subparsers = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        found += [Command(script, (), parser)] * (not subparsers)
        found += [Command(script, (name,), sub) for action in subparsers for name, sub in action.choices.items()]
    return found
