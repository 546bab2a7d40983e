"""The command line of the scripts. No torch in here, so that --help and a wrong flag are quick."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn, TypeVar

from common import __version__
from common.config import Config
from common.errors import InputError, fail
from common.settings import add_options, from_flags, given_of

T = TypeVar("T")


class Parser(argparse.ArgumentParser):
    """An argument parser that reports a wrong option in one line."""

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, **kwargs)
        self.add_argument("--version", action="version", version=f"DuoDiff {__version__}", help="print the version")

    def parse_known_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> Any:
        words = sys.argv[1:] if args is None else list(args)
        for text in words:
            if text.startswith("--") and text.endswith("=--"):  # argparse would read an empty list
                self.error(f"{text}: '--' is no value")
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        fail(self.prog, f"{message} (see {self.prog} --help)")

    def settings(self, cls: type[T], argv: Sequence[str] | T | None, *, network: bool = True, **more: Any) -> T:
        """Settings from the command line: a flag for each field.

        argv: the words of the command line; or settings, which are returned unchanged. network: also add the flags
        of a network's description; their values become the field `described`, nested as in a YAML file. more: fields
        without a flag.
        """
        if isinstance(argv, cls):
            return argv
        assert argv is None or isinstance(argv, Sequence), f"{type(argv).__name__}, wanted {cls.__name__}"
        add_options(self, cls)
        if network:
            add_options(self, Config, partial=True)
        given = vars(self.parse_args(argv))
        if network:
            more["described"] = given_of(Config, given)
        try:
            return from_flags(cls, given, **more)
        except InputError as error:
            self.error(str(error))
