"""Score samples against real images: FID, and KID, Inception score, precision and recall."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from common.cli import BATCH_SIZE, Parser, add_common_options, any_path, any_text, existing_file, existing_path, whole
from common.errors import command
from data import CROPS, DATASETS

METRICS = ("fid", "kid", "is", "prc")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--samples_path",
        type=existing_path,
        required=True,
        help="folder of images, as sampler.py writes it, or an .npz with arr_0, uint8 (N, H, W, 3), whose scores go to "
        "<name>_report/ beside it",
    )
    parser.add_argument("--dataset", choices=tuple(DATASETS), help="score against its whole training set")
    parser.add_argument("--data_path", type=existing_path, help="where the dataset lies")
    parser.add_argument("--crop", choices=CROPS, help="of the dataset; that of the samples' network unless given")
    parser.add_argument("--download", action="store_true", help="fetch the dataset first, if it is not there")
    parser.add_argument(
        "--reference",
        type=existing_path,
        help="score against a folder of images, or an .npz with mu and sigma, or with images in arr_0",
    )
    parser.add_argument(
        "--n_reference",
        type=whole(2, 10_000_000),
        help="only so many real images, evenly spaced, less those that are broken; all unless given",
    )
    parser.add_argument("--metrics", type=metrics, default=("fid",), metavar="fid,kid,is,prc", help="comma-separated")
    parser.add_argument(
        "--feature_extractor",
        type=any_text,
        default="inception",
        help="inception, or a TorchScript file: uint8 (N, C, H, W) -> (N, D)",
    )
    parser.add_argument(
        "--feature_extractor_weights", type=existing_file, help="of inception; downloaded once unless given"
    )
    parser.add_argument(
        "--save_stats",
        type=any_path,
        help="write mu and sigma of the samples to this .npz, a --reference for later",
    )
    parser.add_argument(
        "--cache_dir", type=any_path, help="statistics of datasets are kept here; ~/.cache/duodiff unless given"
    )
    parser.add_argument("--batch_size", type=BATCH_SIZE, default=64)
    add_common_options(parser)
    args = parser.parse_args(argv)

    if not args.samples_path.is_dir() and args.samples_path.suffix != ".npz":
        parser.error(f"--samples_path {args.samples_path}: wanted a folder of images, or an .npz")
    if args.save_stats and args.save_stats.is_dir():
        parser.error(
            f"--save_stats {args.save_stats}: is a folder; name a file, such as {args.save_stats / 'stats.npz'}"
        )
    if args.save_stats and args.save_stats.exists():
        for name in ("samples_path", "reference"):
            if (path := getattr(args, name)) and path.samefile(args.save_stats):
                parser.error(f"--save_stats {args.save_stats}: would replace --{name}; name another file")
    if (args.dataset is None) == (args.reference is None) and not (args.save_stats and args.dataset is None):
        parser.error("give --dataset or --reference, one of them, to score against")
    for name in ("data_path", "crop", "download"):
        if getattr(args, name) and not args.dataset:
            parser.error(f"--{name} needs --dataset")
    if args.feature_extractor != "inception":
        if not Path(args.feature_extractor).is_file():
            parser.error(f"--feature_extractor {args.feature_extractor}: no such file (or give inception)")
        if args.feature_extractor_weights:
            parser.error("--feature_extractor_weights belongs to --feature_extractor inception")
        if "is" in args.metrics:
            parser.error("--metrics is: the Inception score needs --feature_extractor inception")
    if args.dataset and args.cache_dir is None:
        args.cache_dir = default_cache(parser)
    return args


def metrics(text: str) -> tuple[str, ...]:
    chosen = tuple(dict.fromkeys(text.split(",")))
    if unknown := [name for name in chosen if name not in METRICS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(METRICS)}")
    return chosen


def default_cache(parser: Parser) -> Path:
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "duodiff"
    except RuntimeError:  # HOME is not set, and the user has no entry that names one
        parser.error("there is no home folder to keep the statistics of the dataset in; give --cache_dir")


@command
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)

    from common.distributed import is_main, joined_processes
    from common.files import writable_folder
    from evaluation.features import load_extractor
    from evaluation.references import open_reference
    from evaluation.samples import Samples
    from evaluation.scoring import score, write_scores
    from evaluation.statistics import save_statistics

    with joined_processes(args.device) as device:
        samples = Samples(args.samples_path)
        reference = open_reference(args, samples) if args.dataset or args.reference else None
        for folder in (
            samples.report,
            args.cache_dir if args.dataset else None,
            args.save_stats and args.save_stats.parent,
        ):
            if folder is not None:
                writable_folder(folder)
        extractor = load_extractor(args.feature_extractor, args.feature_extractor_weights, device)
        if args.save_stats and (statistics := samples.statistics(extractor, args.batch_size, args.quiet)):
            save_statistics(args.save_stats, statistics)
            print(f"statistics of {len(samples.images)} images -> {args.save_stats}")
        if reference is not None:
            scores = score(samples, reference, extractor, args.metrics, args.batch_size, args.quiet)
            if is_main():
                print(", ".join(f"{name} {value:.4g}" for name, value in scores.items()))
                print(f"-> {write_scores(samples, reference, extractor, scores)}")


if __name__ == "__main__":
    main()
