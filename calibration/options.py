"""The options of a calibration, for calibrate.py and sampler.py. No torch in here."""

from __future__ import annotations

import argparse

from common.cli import existing_path, real, whole
from data import CROPS, DATASETS

CALIBRATION_OPTIONS = ("dataset", "data_path", "crop", "n_images", "speedup", "budget")
CALIBRATION_IMAGES = 256


def add_calibration_options(parser: argparse._ActionsContainer, *, required: bool = False) -> None:
    """The names are those of CALIBRATION_OPTIONS. required: --dataset is."""
    parser.add_argument(
        "--dataset",
        choices=tuple(DATASETS),
        required=required,
        help="real images to measure on; better the training set's",
    )
    parser.add_argument("--data_path", type=existing_path, help="where the dataset lies")
    parser.add_argument("--crop", choices=CROPS, help="of the dataset; that of the networks unless given")
    parser.add_argument(
        "--n_images", type=whole(2, 10_000_000), default=CALIBRATION_IMAGES, help="as many of them are measured on"
    )
    goal = parser.add_mutually_exclusive_group()
    goal.add_argument(
        "--speedup",
        type=real(1, 1e6),
        help="take the least divergence at this speed-up, as predicted from calls that are not compiled; if neither is "
        "said, the knee of the curve",
    )
    goal.add_argument(
        "--budget",
        type=real(0, 1e9),
        help="take the fastest with at most this divergence, in nats per dimension of an image "
        "(deterministic solvers: squared shift per dimension)",
    )
