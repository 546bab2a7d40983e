"""Train a full backbone."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from training.options import add_training_options, check_training_options

from common.cli import Parser
from common.distributed import joined_processes
from common.errors import command


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", choices=("uvit",), default="uvit", help="main.py trains early-exit models")
    add_training_options(parser)
    return check_training_options(parser, parser.parse_args(argv), argv)


@command
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)

    from training.setup import backbone_trainer

    with joined_processes(args.device) as device:
        backbone_trainer(args, device).train()


if __name__ == "__main__":
    main()
