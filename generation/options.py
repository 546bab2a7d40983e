"""Command-line options of the sampling scripts. No torch in here."""

from __future__ import annotations

import argparse
from typing import Any

from common.cli import (
    BATCH_SIZE,
    IMAGES,
    SEED,
    STEPS,
    TIMESTEP,
    Parser,
    add_common_options,
    add_model_options,
    any_path,
    existing_file,
    existing_path,
    real,
    task_settings,
    whole,
    word_or,
)
from common.config import MOST, PRECISIONS, SOLVERS

DESCRIBING = "network, for weights that came without a description (each beats --config_path)"
DESCRIBING_FIRST = f"{DESCRIBING}; of several networks the first, but parametrization and num_timesteps of all"
DEFAULT_STEPS = {"ddpm": None, "ddim": 50, "dpmsolver++": 20, "unipc": 20}  # None: every timestep


def add_sampling_options(parser: Parser, *, one_network: bool = True) -> None:
    """one_network: --checkpoint_path is the only way to name it."""
    parser.add_argument(
        "--checkpoint_path", type=existing_file, required=one_network, help="weights: .pth or .safetensors"
    )
    parser.add_argument(
        "--config_path",
        type=existing_file,
        help="YAML file of the network; only for weights that came without one",
    )
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema", help="which weights of a checkpoint")
    parser.add_argument("--output_folder", type=any_path, required=True, help="images go here, the rest to its report/")
    parser.add_argument(
        "--autoencoder_checkpoint_path",
        type=existing_path,
        help="of networks that make latents: autoencoder_kl.pth or a folder of diffusers; beats --config_path",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the samples that are there")
    parser.add_argument("--seed", type=SEED, default=0, help="sample i depends on this and i alone")
    parser.add_argument("--n_samples", type=IMAGES, help="as many as --batch_size unless given")
    parser.add_argument("--batch_size", type=BATCH_SIZE, default=128, help="samples made at a time")
    add_solver_options(parser)
    parser.add_argument(
        "--class_id",
        type=word_or("random", whole(0, MOST["num_classes"])),
        nargs="+",
        default=["random"],
        help="random, or one class, or several that take turns (class-conditional networks only)",
    )
    parser.add_argument(
        "--timesteps_save",
        type=TIMESTEP,
        nargs="+",
        default=[],
        help="also save x_t at these t, to report/frames",
    )
    parser.add_argument(
        "--allow_outside_range",
        action="store_true",
        help="let a network run at timesteps that it was not trained on (see --t_min of train.py)",
    )
    add_speed_options(parser)
    add_common_options(parser)
    add_model_options(parser, DESCRIBING if one_network else DESCRIBING_FIRST)


def add_solver_options(parser: Parser) -> None:
    parser.add_argument("--solver", choices=SOLVERS, default="ddpm")
    parser.add_argument(
        "--steps", type=STEPS, help="network calls per image; if not given, every t for ddpm, 50 for ddim, else 20"
    )
    parser.add_argument("--eta", type=real(0, 1), help="of ddim: 0 deterministic (unless given), 1 as random as ddpm")
    parser.add_argument("--clip_x0", action="store_true", help="hold the predicted clean image to [-1, 1]")
    parser.add_argument(
        "--guidance_scale",
        type=real(0, 1000),
        default=0.0,
        help="s in cond + s (cond - uncond); 0: off. Needs a network with a class for none",
    )


def add_speed_options(parser: Parser) -> None:
    add_precision_option(parser)
    parser.add_argument("--compile", action="store_true", help="compile the networks first (torch.compile): a minute")


def add_precision_option(parser: Parser) -> None:
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="of the networks; unless given bf16 where the device calculates in it, else fp32",
    )


def check_sampling_options(parser: Parser, args: argparse.Namespace) -> argparse.Namespace:
    """Fill in what depends on other options; end on combinations that make no sense."""
    check_solver_options(parser, args)
    args.n_samples = args.n_samples or args.batch_size
    if "random" in args.class_id and len(args.class_id) > 1:
        parser.error("--class_id: give random alone, or classes")
    return args


def check_solver_options(parser: Parser, args: argparse.Namespace) -> None:
    if args.solver != "ddim" and args.eta is not None:
        parser.error(f"--eta belongs to --solver ddim, not {args.solver}")
    args.eta = args.eta or 0.0
    args.steps = args.steps or DEFAULT_STEPS[args.solver]


def network_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What the flags say of all networks of a run, see common.config; None where a flag was not given."""
    settings = task_settings(args)
    if args.autoencoder_checkpoint_path:
        settings["autoencoder"] = {"checkpoint_path": str(args.autoencoder_checkpoint_path)}
    return settings
