"""Train a shallow backbone, or an early-exit model (probes and exit heads on a backbone)."""

from __future__ import annotations

if __name__ == "__main__":
    from common.startup import end_in_one_line

    end_in_one_line()  # on a signal during the imports below

from collections.abc import Sequence

from common.cli import Parser, silence
from common.distributed import joined_processes
from common.errors import command
from training.settings import TrainingSettings, typed_words


def parse_settings(argv: Sequence[str] | None) -> TrainingSettings:
    parser = Parser(description=__doc__)
    return parser.settings(TrainingSettings, argv, command=typed_words(parser, argv))


@command
def main(argv: Sequence[str] | None = None) -> None:
    settings = parse_settings(argv)
    silence(settings.machine.quiet)

    from training.loop import ending_in_order, train
    from training.setup import prepare

    with joined_processes(settings.machine.device) as device:
        run = prepare(settings, device)
        with ending_in_order(run) as stop:
            train(run, stop)


if __name__ == "__main__":
    main()
