"""Train a shallow backbone, or an early-exit model (probes and exit heads on a backbone)."""

from __future__ import annotations

from collections.abc import Sequence

from common.cli import Parser
from common.errors import command
from train import run
from training.settings import TrainingSettings, typed_words


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    run(parser.settings(TrainingSettings, argv, command=typed_words(parser, argv)))


if __name__ == "__main__":
    main()
