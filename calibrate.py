"""Find out where to switch: what two or more networks cost and give at every timestep, and who should run when."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from calibration.options import add_calibration_options
from common.cli import (
    BATCH_SIZE,
    SEED,
    Parser,
    add_common_options,
    add_model_options,
    any_path,
    any_text,
    architecture,
    architecture_flags,
    existing_file,
    existing_path,
    whole,
)
from common.errors import InputError, command
from generation.options import (
    DESCRIBING_FIRST,
    add_precision_option,
    add_solver_options,
    check_solver_options,
    network_settings,
)

if TYPE_CHECKING:
    from calibration.run import Calibration

NONE = "none"
BESIDE = (".json", ".png")  # the schedule
VERIFYING = (
    *("n_samples", "sample_seeds", "reference", "feature_extractor", "feature_extractor_weights"),
    "autoencoder_checkpoint_path",
)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--checkpoint_path",
        type=existing_file,
        nargs="+",
        required=True,
        help="two networks or more, the full one last",
    )
    parser.add_argument(
        "--config_path",
        type=lambda text: None if text == NONE else existing_file(text),
        nargs="+",
        help=f"a YAML file for each, only for weights that came without; {NONE} for the others",
    )
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema", help="which weights of the checkpoints")
    parser.add_argument(
        "--batch_size", type=BATCH_SIZE, default=128, help="images in a call, whose time is measured too"
    )
    parser.add_argument("--seed", type=SEED, default=0, help="of the choice of images and their noise")
    parser.add_argument(
        "--free", action="store_true", help="let networks take turns in any order, not the full one last"
    )
    parser.add_argument(
        "--allow_outside_range", action="store_true", help="ask networks about timesteps they never saw"
    )
    parser.add_argument(
        "--output", type=any_path, default=Path("calibration.yaml"), help="the schedule; beside it a .json and a .png"
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace an --output that is no calibration, and samples that --verify made with other settings",
    )
    add_calibration_options(parser, required=True)
    add_solver_options(parser)
    add_precision_option(parser)
    group = parser.add_argument_group("scores of samples beside it")
    group.add_argument(
        "--verify", type=whole(2, 100_000), metavar="K", help="sample and score K switches, the chosen one among them"
    )
    group.add_argument("--n_samples", type=whole(2, 10_000_000), default=1000, help="of each switch and seed")
    group.add_argument("--sample_seeds", type=SEED, nargs="+", default=[0], help="the same for every switch")
    group.add_argument(
        "--reference", type=existing_path, help="what to score against, see fid.py --help; --dataset unless given"
    )
    group.add_argument("--feature_extractor", type=any_text, default="inception", help="see fid.py --help")
    group.add_argument("--feature_extractor_weights", type=existing_file, help="see fid.py --help")
    group.add_argument("--autoencoder_checkpoint_path", type=existing_path, help="see sampler.py --help")
    add_common_options(parser)
    add_model_options(parser, DESCRIBING_FIRST)
    args = parser.parse_args(argv)
    check_solver_options(parser, args)
    if len(args.checkpoint_path) < 2:
        parser.error("--checkpoint_path: give two networks or more, the full one last")
    args.config_path = args.config_path or [None] * len(args.checkpoint_path)
    if len(args.config_path) != len(args.checkpoint_path):
        parser.error(
            f"--config_path: one for each of the {len(args.checkpoint_path)} networks, {NONE} where none is needed"
        )
    if args.output.suffix not in (".yaml", ".yml"):
        parser.error(f"--output {args.output}: wanted a .yaml")
    for name in VERIFYING:
        if args.verify is None and getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name} needs --verify")
    if len(set(args.sample_seeds)) < len(args.sample_seeds):
        parser.error("--sample_seeds: each once")
    return args


@command
def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)

    from calibration.report import as_table, in_words, save
    from calibration.run import calibrate
    from common.devices import device_name, pick_device, pick_precision
    from common.files import writable_folder
    from evaluation.features import load_extractor
    from models.loading import load_together

    device = pick_device(args.device)
    args.precision = pick_precision(args.precision, device)
    files = list(zip(args.checkpoint_path, args.config_path, strict=True))
    flags = network_settings(args), architecture(args)
    networks = load_together(files, *flags, weights=args.weights, device=device)
    writable_folder(args.output.parent)
    check_output(args)
    if args.verify:
        if networks[-1].config.autoencoder and args.data_path and not args.reference:
            raise InputError(f"--verify: {args.data_path} holds latents; give --reference, images to score against")
        load_extractor(args.feature_extractor, args.feature_extractor_weights, device)  # or end now, not after sampling
    calibration = calibrate(args, networks, device)
    sampling = f"{args.solver}, {len(calibration.steps.timesteps)} steps"
    n_images = calibration.predictions.error.shape[-1]
    print(f"{n_images} images of {args.dataset}, {sampling}, calls in {args.precision} on {device_name(device)}")
    print(as_table(calibration))
    print(in_words(calibration))
    save(args.output, calibration, files, args)
    if args.verify:
        scores = verify(args, calibration, files)
        save(args.output, calibration, files, args, scores)
        print(as_table(calibration, scores))
    beside = ", ".join(str(args.output.with_suffix(suffix)) for suffix in BESIDE)
    print(f"-> {args.output} (for sampler.py --schedule), {beside}")


def check_output(args: argparse.Namespace) -> None:
    """Raises InputError where a file would be replaced that no calibration wrote."""
    from generation.schedule_file import is_calibration

    there = [path for path in (args.output, *map(args.output.with_suffix, BESIDE)) if path.exists()]
    if there and not args.overwrite and not is_calibration(args.output):
        raise InputError(
            f"{there[0]} is there already, and of no calibration; name another --output or give --overwrite"
        )


def verify(
    args: argparse.Namespace, calibration: Calibration, files: Sequence[tuple[Path, Path | None]]
) -> dict[int, list[float]]:
    """Scores of samples, one a seed, by the number of the option: of the full network, the chosen option and others."""
    import numpy as np

    import fid
    import sampler
    from calibration.report import name_of, stages_of
    from common.files import read_json, writable_folder
    from generation.schedule_file import ScheduleFile, write_schedule

    options = calibration.options
    chosen = options.index(calibration.chosen)
    numbers = {0, chosen, *np.linspace(0, len(options) - 1, args.verify).round().astype(int).tolist()}
    while len(numbers) > max(args.verify, len({0, chosen})):  # drop those nearest to the two that must stay
        numbers.remove(min(numbers - {0, chosen}, key=lambda number: min(number, abs(number - chosen))))
    folder = writable_folder(args.output.with_name(f"{args.output.stem}_verify"))
    sampling = ["--solver", args.solver, "--steps", args.steps or len(calibration.steps.timesteps)]
    sampling += ["--eta", args.eta] if args.solver == "ddim" else []
    flags = ("clip_x0", "quiet", "allow_outside_range", "overwrite")
    sampling += [f"--{name}" for name in flags if getattr(args, name)]
    sampling += ["--precision", args.precision, "--weights", args.weights]
    sampling += ["--batch_size", min(args.batch_size, args.n_samples), "--n_samples", args.n_samples]
    against = ("reference",) if args.reference else ("dataset", "data_path", "crop")
    scoring = ["--feature_extractor", args.feature_extractor] + ["--quiet"] * args.quiet
    for argv, names in (
        (sampling, ("parametrization", "num_timesteps", "autoencoder_checkpoint_path")),
        (scoring, (*against, "feature_extractor_weights")),
    ):
        argv += ["--device", args.device]
        for name in names:
            argv += [f"--{name}", getattr(args, name)] if getattr(args, name) else []
    scores: dict[int, list[float]] = {}
    for number in sorted(numbers):
        name = "-".join(name_of(calibration, options[number]).replace("+ ", "").split())
        schedule = folder / f"{name}.yaml"
        stages = stages_of(calibration, options[number], files, args.guidance_scale)
        write_schedule(schedule, ScheduleFile(stages=stages))
        for seed in args.sample_seeds:
            samples = folder / f"{name}_seed-{seed}"
            argv = ["--schedule", schedule, "--seed", seed, "--output_folder", samples, *sampling]
            run(sampler.main, [*argv, *(architecture_flags(args) if stages[0].checkpoint_path == files[0][0] else ())])
            run(fid.main, ["--samples_path", samples, *scoring])
            scores.setdefault(number, []).append(read_json(samples / "report" / "metrics.json")["fid"])
    return scores


def run(main, argv: Sequence[object]) -> None:
    main([str(arg) for arg in argv])


if __name__ == "__main__":
    main()
