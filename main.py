"""Train a shallow backbone, or an early-exit model (probes and exit heads on a backbone)."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from common.cli import Parser, existing_file, real
from common.config import CLASSIFIER_TYPES
from common.distributed import joined_processes
from common.errors import command
from training.options import add_training_options, check_training_options


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", choices=("uvit", "deediff_uvit"), required=True)
    add_training_options(parser)
    group = parser.add_argument_group("early exit (--model deediff_uvit)")
    group.add_argument("--load_backbone", type=existing_file, help="weights of the trained full backbone")
    group.add_argument("--freeze_backbone", action="store_true", help="train probes and exit heads alone")
    group.add_argument("--classifier_type", choices=CLASSIFIER_TYPES, help="the probes; beats --config_path")
    group.add_argument("--use_unweighted_loss", action="store_true", help="add the exits' plain squared errors")
    group.add_argument("--preview_threshold", type=real(0, 1), help="exit threshold of the previews; 0.1 unless given")
    args = check_training_options(parser, parser.parse_args(argv), argv)
    if args.model == "uvit":
        for name in (
            "load_backbone",
            "freeze_backbone",
            "classifier_type",
            "use_unweighted_loss",
            "preview_threshold",
        ):
            if getattr(args, name) not in (None, False):
                parser.error(f"--{name} belongs to --model deediff_uvit")
        return args
    for name in ("init_from", "distill_from"):
        if getattr(args, name) is not None:
            parser.error(f"--{name} belongs to --model uvit")
    if args.freeze_backbone and not args.load_backbone:
        parser.error("--freeze_backbone needs --load_backbone: a backbone with fresh weights is of no use frozen")
    return args


@command
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)

    from training.setup import backbone_trainer, early_exit_trainer

    make_trainer = backbone_trainer if args.model == "uvit" else early_exit_trainer
    with joined_processes(args.device) as device:
        make_trainer(args, device).train()


if __name__ == "__main__":
    main()
