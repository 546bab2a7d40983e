"""Train a shallow backbone, or an early-exit model (probes and exit heads on a backbone)."""

from __future__ import annotations

from collections.abc import Sequence

from common.cli import Parser
from common.errors import command
from train import run
from training.settings import TrainingSettings, typed_words


def parse_settings(argv: Sequence[str] | None) -> TrainingSettings:
    parser = Parser(description=__doc__)
    return parser.settings(TrainingSettings, argv, command=typed_words(parser, argv))


@command
def main(argv: Sequence[str] | None = None) -> None:
    run(parse_settings(argv))


if __name__ == "__main__":
    main()
