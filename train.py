"""Train a full backbone."""

from __future__ import annotations

from collections.abc import Sequence

from common.cli import Parser
from common.distributed import joined_processes
from common.errors import command
from training.settings import BackboneSettings, TrainingSettings, typed_words


def parse_settings(argv: Sequence[str] | None) -> BackboneSettings:
    parser = Parser(description=__doc__)
    return parser.settings(BackboneSettings, argv, command=typed_words(parser, argv))


@command
def main(argv: Sequence[str] | None = None) -> None:
    run(parse_settings(argv))


def run(settings: TrainingSettings) -> None:
    """Train to the last step, from the beginning or from a checkpoint."""
    from training.loop import train
    from training.setup import prepare

    with joined_processes(settings.machine.device) as device:
        train(prepare(settings, device))


if __name__ == "__main__":
    main()
