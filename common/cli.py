"""Command-line options the scripts share. No torch in here, so that --help and a wrong flag are quick."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from common.config import MOST, PARAMETRIZATIONS, UViTConfig, shown
from common.errors import fail

T = TypeVar("T")


class Parser(argparse.ArgumentParser):
    """An argument parser that ends on a wrong option in one line, and shows defaults in --help."""

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **kwargs)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        for text in sys.argv[1:] if args is None else args:
            if text.startswith("--") and text.endswith("=--"):  # argparse takes it for a list of no values
                self.error(f"{text}: '--' is no value")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        fail(self.prog, f"{message} (see {self.prog} --help)")


def whole(least: int, most: int) -> Callable[[str], int]:
    """An argparse type: an int in least..most."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:  # no number, or one of thousands of digits
            value = None
        if value is None or not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{shown(text)} is no whole number in {least}..{most}")
        return value

    return parse


def real(least: float, most: float, *, above: bool = False) -> Callable[[str], float]:
    """An argparse type: a float in [least, most], or in (least, most] with above=True."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most or (above and value == least):
            wanted = f"above {least:.10g}, up to {most:.10g}" if above else f"from {least:.10g} to {most:.10g}"
            raise argparse.ArgumentTypeError(f"{shown(text)} is no number {wanted}")
        return value

    return parse


def word_or(word: str, other: Callable[[str], T]) -> Callable[[str], str | T]:
    """An argparse type: the word, or what another type takes."""

    def parse(text: str) -> str | T:
        if text == word:
            return word
        try:
            return other(text)
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentTypeError(f"{error}, or {word}") from None

    return parse


def any_text(text: str) -> str:
    """An argparse type: a text that is not empty."""
    if not text:
        raise argparse.ArgumentTypeError("is empty; was a variable meant that is not set?")
    return text


def any_path(text: str) -> Path:
    """An argparse type: a path, whether something is there or not."""
    return Path(any_text(text))


def existing_file(text: str) -> Path:
    """An argparse type: a path to a file that is there."""
    path = any_path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"{text}: {'is a folder' if path.is_dir() else 'no such file'}")
    return path


def existing_path(text: str) -> Path:
    """An argparse type: a path that is there."""
    path = any_path(text)
    if not path.exists():
        raise argparse.ArgumentTypeError(f"{text}: no such file or folder")
    return path


# Types of options that several scripts have. Every number has an upper bound, far above what is of use.
SEED = whole(0, 2**63 - 1)
OPTIMISER_STEPS = whole(1, 1_000_000_000)
BATCH_SIZE = whole(1, 2**20)
IMAGES = whole(1, 10_000_000)
STEPS = whole(1, MOST["num_timesteps"])  # of a solver
TIMESTEP = whole(0, MOST["num_timesteps"] - 1)
T_SWITCH = whole(-1, MOST["num_timesteps"] - 1)


def add_common_options(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--device", type=any_text, default="auto", help="auto (CUDA, then MPS, then CPU), cpu, cuda, cuda:1, mps"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def add_model_options(parser: argparse.ArgumentParser, title: str) -> None:
    """One flag for each field of UViTConfig, and what else of a network's description can be a flag."""
    group = parser.add_argument_group(title)
    group.add_argument("--img_size", type=whole(1, MOST["img_size"]), help="side of the images")
    group.add_argument("--patch_size", type=whole(1, MOST["patch_size"]), help="side of a patch")
    group.add_argument("--in_chans", type=whole(1, MOST["in_chans"]), help="channels: 3 colour, 1 grey")
    group.add_argument("--embed_dim", type=whole(1, MOST["embed_dim"]), help="width of the tokens")
    group.add_argument("--depth", type=whole(1, MOST["depth"]), help="blocks; an even depth has one more")
    group.add_argument("--num_heads", type=whole(1, MOST["num_heads"]), help="attention heads")
    group.add_argument("--mlp_ratio", type=real(0, MOST["mlp_ratio"], above=True), help="MLP width over token width")
    group.add_argument("--num_classes", type=whole(-1, MOST["num_classes"]), help="-1: unconditional")
    for name, text in (
        ("qkv_bias", "bias in the attention's projections"),
        ("mlp_time_embed", "an MLP on the timestep embedding"),
        ("normalize_timesteps", "give the network t / 1000"),
        ("conv", "a final 3 x 3 convolution"),
    ):
        group.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, help=text)
    group.add_argument(
        "--parametrization", choices=PARAMETRIZATIONS, help="what the network predicts; predict_noise by default"
    )
    group.add_argument(
        "--num_timesteps", type=whole(1, MOST["num_timesteps"]), help="T of the noise schedule; 1000 by default"
    )


def architecture(args: argparse.Namespace) -> dict[str, Any]:
    """The settings (see common.config) of one network's own that `add_model_options` read; None where not given."""
    return {"model_params": {name: getattr(args, name) for name in UViTConfig.__dataclass_fields__}}


def task_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Those that networks on one image share; None where a flag was not given."""
    return {"parametrization": args.parametrization, "diffusion_params": {"num_timesteps": args.num_timesteps}}


def architecture_flags(args: argparse.Namespace) -> list[str]:
    """The flags, as one would type them, that `architecture` came from."""
    argv: list[str] = []
    for name, value in architecture(args)["model_params"].items():
        if isinstance(value, bool):
            argv.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            argv += [f"--{name}", str(value)]
    return argv
