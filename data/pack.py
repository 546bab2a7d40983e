"""Decode a dataset once, into one array that training reads at the speed of the disk: python -m data.pack."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from common.cli import Parser, add_common_options, any_path, existing_path, real, whole
from common.config import MOST
from common.errors import command
from data import CROPS, DATASETS, crop_of, open_source

if TYPE_CHECKING:
    from data.dataset import ImageDataset


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--dataset", choices=tuple(DATASETS))
    parser.add_argument("--data_path", type=existing_path, help="where the dataset lies; datasets/ unless given")
    parser.add_argument("--download", action="store_true", help="fetch the dataset first, where that is possible")
    parser.add_argument("--img_size", type=whole(1, MOST["img_size"]), help="side of the packed images")
    parser.add_argument("--crop", choices=CROPS, help="how images are made square; the dataset's default unless given")
    parser.add_argument("--in_chans", type=whole(1, MOST["in_chans"]), default=3, help="channels: 3 colour, 1 grey")
    parser.add_argument(
        "--num_classes",
        type=whole(-1, MOST["num_classes"]),
        default=-1,
        help="of --dataset folder, to pack labels with it",
    )
    parser.add_argument(
        "--output",
        type=any_path,
        help="folder to make; packed/<name> under --data_path unless given; "
        "with --benchmark: where there is room for 3 GB for a while",
    )
    parser.add_argument("--num_workers", type=whole(0, 1024), default=num_cores(), help="processes that decode")
    parser.add_argument(
        "--autoencoder_checkpoint_path",
        type=existing_path,
        help="pack latents of this autoencoder: autoencoder_kl.pth or a folder of diffusers",
    )
    parser.add_argument(
        "--scale_factor", type=real(0, 1000, above=True), default=0.18215, help="that latents are multiplied by"
    )
    add_common_options(parser)
    parser.add_argument("--benchmark", action="store_true", help="measure packing and loading on images it makes")
    args = parser.parse_args(argv)
    if not args.benchmark and (args.dataset is None or args.img_size is None):
        parser.error("--dataset and --img_size are needed")
    return args


@command
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if args.benchmark:
        from data.benchmark import run

        return run(args.output, max(1, args.num_workers))
    crop = crop_of(args.dataset, args.crop)
    shape = {"img_size": args.img_size, "in_chans": args.in_chans, "crop": crop}
    dataset = open_source(args.dataset, args.data_path, **shape, num_classes=args.num_classes, download=args.download)

    from data.dataset import some_of
    from data.packed import IMAGES, MANIFEST, default_folder
    from data.packing import in_bytes, pack

    if args.autoencoder_checkpoint_path:
        dataset = encoded(dataset, args)
        shape |= {name: dataset.describe()[name] for name in ("img_size", "in_chans")}
    output = args.output or default_folder(args.dataset, args.data_path, **shape)
    manifest = pack(dataset, output, args.num_workers, args.quiet)
    print(f"{manifest.shape[0]:,} images -> {output} ({in_bytes((output / IMAGES).stat().st_size)})")
    if manifest.left_out:
        print(f"{some_of(manifest.left_out)}; all are named in {output / MANIFEST}")


def encoded(images: ImageDataset, args: argparse.Namespace) -> ImageDataset:
    """The images as latents."""
    from common.devices import pick_device
    from data.latents import LatentSource
    from models.autoencoder import load_autoencoder

    device = pick_device(args.device)
    autoencoder = load_autoencoder(args.autoencoder_checkpoint_path, args.scale_factor, device)
    return LatentSource(images, autoencoder, args.autoencoder_checkpoint_path, device)


def num_cores() -> int:
    """Those this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    main()
