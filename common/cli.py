"""Command-line options the scripts share. No torch in here, so that --help and a wrong flag are quick."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from common.config import PARAMETRIZATIONS, UViTConfig
from common.errors import fail


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


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """An argparse type: an int in least..most."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None
        if value < least or (most is not None and value > most):
            wanted = f"at least {least}" if most is None else f"{least}..{most}"
            raise argparse.ArgumentTypeError(f"{value} is out of range, wanted {wanted}")
        return value

    return parse


def real(least: float, most: float = math.inf, *, above: bool = False) -> Callable[[str], float]:
    """An argparse type: a finite float in [least, most], or (least, most] with above=True."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no number") from None
        if not math.isfinite(value) or not least <= value <= most or (above and value == least):
            wanted = f"{'more than' if above else 'at least'} {least:g}"
            wanted += "" if most == math.inf else f" and at most {most:g}"
            raise argparse.ArgumentTypeError(f"{text} is out of range, wanted {wanted}")
        return value

    return parse


def existing_file(text: str) -> Path:
    """An argparse type: a path to a file that is there."""
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"{text}: {'is a folder' if path.is_dir() else 'no such file'}")
    return path


def existing_path(text: str) -> Path:
    """An argparse type: a path that is there."""
    path = Path(text)
    if not path.exists():
        raise argparse.ArgumentTypeError(f"{text}: no such file or folder")
    return path


SEED = whole(0, 2**63 - 1)


def add_common_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto (CUDA, then MPS, then CPU), cpu, cuda, cuda:1, mps")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """One flag for each field of UViTConfig; each beats the YAML file."""
    group = parser.add_argument_group("network (each beats --config_path)")
    group.add_argument("--config_path", type=existing_file, help="YAML file that describes the network")
    group.add_argument("--img_size", type=whole(1), help="side of the images")
    group.add_argument("--patch_size", type=whole(1), help="side of a patch")
    group.add_argument("--in_chans", type=whole(1), help="channels: 3 colour, 1 grey")
    group.add_argument("--embed_dim", type=whole(1), help="width of the tokens")
    group.add_argument("--depth", type=whole(1), help="blocks; an even depth has one more")
    group.add_argument("--num_heads", type=whole(1), help="attention heads")
    group.add_argument("--mlp_ratio", type=real(0, above=True), help="MLP width over token width")
    group.add_argument("--num_classes", type=whole(-1), help="-1: unconditional")
    for name, text in (
        ("qkv_bias", "bias in the attention's projections"),
        ("mlp_time_embed", "an MLP on the timestep embedding"),
        ("normalize_timesteps", "give the network t / 1000"),
        ("conv", "a final 3 x 3 convolution"),
    ):
        group.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, help=text)
    group.add_argument(
        "--parametrization",
        choices=PARAMETRIZATIONS,
        help="what the network predicts; predict_noise if not said",
    )


def model_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings (see common.config) that `add_model_options` read; None where a flag was not given."""
    names = UViTConfig.__dataclass_fields__
    return {
        "model_params": {name: getattr(args, name) for name in names},
        "parametrization": args.parametrization,
    }
