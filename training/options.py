"""Command-line options of the training scripts. No torch in here."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from common.cli import (
    BATCH_SIZE,
    OPTIMISER_STEPS,
    SEED,
    TIMESTEP,
    Parser,
    add_common_options,
    add_model_options,
    any_path,
    any_text,
    existing_file,
    existing_path,
    real,
    whole,
)
from common.config import MOST
from common.distributed import world_size
from data import CROPS, DATASETS


def add_training_options(parser: Parser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", choices=tuple(DATASETS), required=True)
    group.add_argument("--data_path", type=existing_path, help="where the dataset lies")
    group.add_argument("--crop", choices=CROPS, help="how images are made square; the dataset's default unless given")
    group.add_argument(
        "--random_flip",
        action=argparse.BooleanOptionalAction,
        help="mirror half of the images; the dataset's own choice unless given",
    )
    group.add_argument(
        "--label_dropout",
        type=real(0, 1),
        default=0.0,
        help='train with "no class" instead of the label this often, for guidance; the network must have such a class',
    )
    group.add_argument("--download", action="store_true", help="fetch the dataset first, if it is not there")
    group.add_argument(
        "--num_workers",
        type=whole(0, 1024),
        help="processes that load images, beside each that trains; if not given, none for what is in memory or packed, "
        "else as many as there are cores for",
    )

    group = parser.add_argument_group("run")
    group.add_argument("--n_steps", type=OPTIMISER_STEPS, required=True, help="optimiser steps")
    group.add_argument(
        "--batch_size", type=BATCH_SIZE, default=128, help="images per optimiser step, of all processes together"
    )
    group.add_argument(
        "--grad_accum_steps", type=BATCH_SIZE, default=1, help="work a batch off in this many equal parts"
    )
    group.add_argument("--seed", type=SEED, default=0, help="weights, data order, noise and timesteps follow from it")
    group.add_argument("--log_path", type=any_path, default=Path("logs"), help="runs are folders in here")
    group.add_argument("--exp_name", type=any_text, help="the run's folder; <dataset>_<model>_<blocks> unless given")
    group.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of the run's folder")
    group.add_argument(
        "--load_checkpoint_path",
        type=existing_file,
        help="go on from this checkpoint: weights, optimiser and step; from step 0 if it holds weights alone",
    )
    group.add_argument(
        "--max_hours", type=real(0, 100_000, above=True), help="save and end after this long, for queues with a limit"
    )
    group.add_argument(
        "--max_bad_steps",
        type=OPTIMISER_STEPS,
        default=10,
        help="a step whose loss or gradient is not finite changes nothing; after this many in a row training stops",
    )
    group.add_argument(
        "--fsdp",
        action="store_true",
        help="under torchrun: spread parameters, optimizer and averages over the processes, not copies of them",
    )
    add_common_options(group)

    group = parser.add_argument_group("optimisation")
    group.add_argument("--lr", type=real(0, 1000, above=True), default=2e-4, help="highest learning rate")
    group.add_argument("--lr_schedule", choices=("cosine", "constant"), default="cosine", help="after the warm-up")
    group.add_argument(
        "--num_warmup_steps", type=whole(0, 1_000_000_000), default=1500, help="the learning rate rises linearly"
    )
    group.add_argument("--weight_decay", type=real(0, 1000), default=0.03)
    group.add_argument("--beta1", type=real(0, 0.999999), default=0.99, help="of AdamW")
    group.add_argument("--beta2", type=real(0, 0.999999), default=0.999, help="of AdamW")
    group.add_argument(
        "--max_grad_norm", type=real(0, 1e9, above=True), default=1.0, help="gradients are clipped to this norm"
    )
    group.add_argument(
        "--ema_decay",
        type=real(0, 0.999999999),
        default=0.9999,
        help="of the averaged weights; 0: no averaging",
    )
    group.add_argument("--use_amp", action="store_true", help="mixed precision")
    group.add_argument("--amp_dtype", choices=("bfloat16", "float16"), default="bfloat16", help="of --use_amp")
    group.add_argument("--compile", action="store_true", help="compile the network first (torch.compile): a minute")
    group.add_argument("--grad_checkpointing", action="store_true", help="less memory, about a third more time")

    group = parser.add_argument_group("logs and checkpoints")
    group.add_argument("--log_every_n_steps", type=OPTIMISER_STEPS, default=2500, help="scalars and a preview")
    group.add_argument(
        "--save_every_n_steps", type=OPTIMISER_STEPS, default=25_000, help="replaces the last checkpoint"
    )
    group.add_argument(
        "--save_new_every_n_steps", type=OPTIMISER_STEPS, default=100_000, help="a checkpoint that stays"
    )
    group.add_argument(
        "--keep_last", type=whole(1, 1_000_000), help="of the checkpoints that stay keep this many; all unless given"
    )
    group.add_argument("--n_samples", type=whole(1, 1024), default=16, help="images in a preview")
    group.add_argument(
        "--preview_steps",
        type=whole(0, MOST["num_timesteps"]),
        default=20,
        help="DDIM steps of a preview; 0: no previews",
    )
    group.add_argument("--sample_seed", type=SEED, default=0, help="of the previews")
    group.add_argument(
        "--autoencoder_checkpoint_path", type=existing_path, help="decodes the previews of a network of latents"
    )
    group.add_argument(
        "--sample_height", type=whole(1, MOST["img_size"]), help="height of the images; checked against the network"
    )
    group.add_argument(
        "--sample_width", type=whole(1, MOST["img_size"]), help="width of the images; checked against the network"
    )

    group = parser.add_argument_group("help of a full network (--model uvit)")
    group.add_argument(
        "--init_from",
        type=existing_file,
        help="begin with its weights: embeddings, head, middle block, and of the other blocks as many as there are "
        "here, evenly spread",
    )
    group.add_argument("--distill_from", type=existing_file, help="learn its predictions, beside the training target")
    group.add_argument(
        "--distill_weight",
        type=real(0, 1e6, above=True),
        help="of the squared error against --distill_from, where that against the target weighs 1; 1 unless given",
    )

    parser.add_argument("--config_path", type=existing_file, help="YAML file that describes the network")
    add_model_options(parser, "network (each beats --config_path)")
    parser.add_argument("--t_min", type=TIMESTEP, help="lowest timestep to train on; 0 by default")
    parser.add_argument("--t_max", type=TIMESTEP, help="highest timestep to train on; T - 1 by default")


def check_training_options(parser: Parser, args: argparse.Namespace, argv: Sequence[str] | None) -> argparse.Namespace:
    """Adds to args: `deadline` of time.monotonic(), the `command` that was typed, as words, and a place for the
    `distill_from_sha256`.
    """
    if args.batch_size % args.grad_accum_steps:
        parser.error(f"--batch_size {args.batch_size} is no multiple of --grad_accum_steps {args.grad_accum_steps}")
    if args.batch_size < (least := world_size() * args.grad_accum_steps):
        parser.error(
            f"--batch_size {args.batch_size}: {world_size()} processes in {args.grad_accum_steps} parts each need at "
            f"least {least}"
        )
    if args.fsdp and world_size() == 1:
        parser.error("--fsdp needs several processes; start the script with torchrun --nproc_per_node=N")
    if args.resume and args.load_checkpoint_path:
        parser.error("--resume and --load_checkpoint_path both say where to go on from; give one")
    if args.init_from and (args.resume or args.load_checkpoint_path):
        parser.error("--init_from begins a new run, --resume and --load_checkpoint_path go on with one; give one")
    if args.distill_weight is not None and not args.distill_from:
        parser.error("--distill_weight needs --distill_from")
    if args.distill_from and args.distill_weight is None:
        args.distill_weight = 1.0
    args.distill_from_sha256 = None
    if args.exp_name is not None and (Path(args.exp_name).name != args.exp_name or args.exp_name == ".."):
        parser.error(f"--exp_name {args.exp_name}: wanted the name of a folder, not a path")
    args.deadline = None if args.max_hours is None else time.monotonic() + 3600 * args.max_hours
    args.command = [*sys.argv] if argv is None else [parser.prog, *argv]
    return args
