"""Choose the switch or the plan: measure the cost and divergence of the networks at every timestep.

The result is a file of stages for sampler.py --stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from calibration.settings import CalibrateSettings, Measurement
from common.cli import Parser
from common.errors import InputError, command
from common.options import SpeedSettings

if TYPE_CHECKING:
    import torch

    from calibration.run import Calibration
    from evaluation.settings import ScoringSettings
    from generation.settings import SamplerSettings
    from models.loading import Network, Runnable

BESIDE = (".json", ".png")  # written in addition to the file of stages


def parse_settings(argv: Sequence[str] | None) -> CalibrateSettings:
    return Parser(description=__doc__).settings(CalibrateSettings, argv)


@command
def main(argv: Sequence[str] | None = None) -> None:
    settings = parse_settings(argv)

    from calibration.report import as_table, in_words, save
    from calibration.run import calibrate
    from common.devices import device_name, pick_device, pick_precision
    from diffusion.schedulers import process_of
    from models.loading import load_together

    device = pick_device(settings.machine.device)
    precision = pick_precision(settings.precision, device)
    networks = load_together(
        settings.files,
        settings.stated,
        with_exits=None if settings.plan else (),
        weights=settings.weights,
        device=device,
        process_of=process_of,
    )
    check_output(settings)
    if settings.plan:
        make_plan(settings, networks, precision, device)
        return
    if settings.verifying.verify:
        check_verifying(settings, networks[-1], device)
    calibration = calibrate(measurement_of(settings, precision), networks, device)
    save(settings.output, calibration, settings.files)
    sampling = f"{settings.solver.solver}, {len(calibration.steps.timesteps)} steps"
    images = f"{calibration.predictions.error.shape[-1]} images of {settings.choice.dataset}"
    print(f"{images}, {sampling}, calls in {precision} on {device_name(device)}")
    print(as_table(calibration))
    print(in_words(calibration))
    if settings.verifying.verify:
        scores = verify(settings, calibration)
        save(settings.output, calibration, settings.files, scores)
        print(as_table(calibration, scores))
    print(output_of(settings))


def make_plan(
    settings: CalibrateSettings, networks: Sequence[Network[Runnable]], precision: str, device: torch.device
) -> None:
    """Choose the best plan (--plan)."""
    from calibration.plan import calibrate_plan
    from calibration.plan_report import in_words, mechanism_table, save, stage_table
    from common.devices import device_name

    calibration = calibrate_plan(measurement_of(settings, precision), networks, device)
    save(settings.output, calibration, settings.files)
    paths = "sampled paths" if settings.choice.paths == "sampled" else f"images of {settings.choice.dataset}"
    sampling = f"{settings.solver.solver}, {len(calibration.prices.timesteps)} steps"
    print(f"{calibration.n_paths} {paths}, {sampling}, calls in {precision} on {device_name(device)}")
    print(mechanism_table(calibration))
    print(stage_table(calibration))
    print(in_words(calibration))
    print(output_of(settings))


def output_of(settings: CalibrateSettings) -> str:
    """The written files, for the last line."""
    beside = ", ".join(str(settings.output.with_suffix(suffix)) for suffix in BESIDE)
    return f"-> {settings.output} (for sampler.py --stages), {beside}"


def measurement_of(settings: CalibrateSettings, precision: str) -> Measurement:
    return Measurement(
        choice=settings.choice,
        solver=settings.solver,
        precision=precision,
        batch_size=settings.batch_size,
        seed=settings.seed,
        guidance_scale=settings.guidance_scale,
        allow_outside_range=settings.allow_outside_range,
        free=settings.free,
        quiet=settings.machine.quiet,
    )


def check_output(settings: CalibrateSettings) -> None:
    """Raises InputError if the output would replace a file that is not a calibration."""
    from common.files import writable_folder
    from generation.stages import is_calibration

    output = settings.output
    writable_folder(output.parent)
    there = [path for path in (output, *map(output.with_suffix, BESIDE)) if path.exists()]
    if there and not settings.overwrite and not is_calibration(output):
        raise InputError(
            f"{there[0]} exists already and is not from calibrate.py; name another --output or give --overwrite"
        )


def check_verifying(settings: CalibrateSettings, full: Network[Runnable], device: torch.device) -> None:
    """Raises InputError, before sampling, if the samples could not be scored."""
    from data import open_dataset
    from data.packing.packed import MANIFEST
    from evaluation.features import load_extractor

    verifying, data_path, dataset = settings.verifying, settings.choice.data_path, settings.choice.dataset
    if full.config.autoencoder and not verifying.reference:
        assert dataset is not None, "CalibrateSettings requires it"
        if data_path and (data_path / MANIFEST).is_file():
            raise InputError(f"--verify: {data_path} holds latents; give --reference, images to score against")
        open_dataset(dataset, data_path, img_size=64, in_chans=3, packed=False)  # the images beside their latents
    load_extractor(verifying.feature_extractor, verifying.feature_extractor_weights, device)


def verify(settings: CalibrateSettings, calibration: Calibration) -> dict[int, list[float]]:
    """Sample and score some options. Returns the scores of each, one per seed, by the number of the option."""
    import fid
    import sampler
    from calibration.report import name_of, stages_of
    from common.files import read_json, writable_folder
    from generation.stages import StageFile, write_stages

    folder = writable_folder(settings.output.with_name(f"{settings.output.stem}_verify"))
    scores: dict[int, list[float]] = {}
    for number in verified_options(settings, calibration):
        option = calibration.options[number]
        name = "-".join(name_of(calibration, option).replace("+ ", "").split())
        stages = folder / f"{name}.yaml"
        write_stages(stages, StageFile(stages=stages_of(calibration, option, settings.files)))
        for seed in settings.verifying.sample_seeds:
            samples = folder / f"{name}_seed-{seed}"
            sampler.main(sampling_of(settings, calibration, stages, seed, samples))
            fid.main(scoring_of(settings, samples))
            scores.setdefault(number, []).append(read_json(samples / "report" / "metrics.json")["fid"])
    return scores


def verified_options(settings: CalibrateSettings, calibration: Calibration) -> list[int]:
    """The numbers of the options to score: the full network, the chosen one, and others evenly spread."""
    import numpy as np

    options, wanted = calibration.options, settings.verifying.verify or 0
    chosen = options.index(calibration.chosen)
    numbers = {0, chosen, *np.linspace(0, len(options) - 1, wanted).round().astype(int).tolist()}
    while len(numbers) > max(wanted, len({0, chosen})):  # drop the number nearest to the two that must stay
        numbers.remove(min(numbers - {0, chosen}, key=lambda number: min(number, abs(number - chosen))))
    return sorted(numbers)


def sampling_of(
    settings: CalibrateSettings, calibration: Calibration, stages: Path, seed: int, samples: Path
) -> SamplerSettings:
    from generation.settings import SamplerSettings
    from generation.stages import read_stages

    verifying, measured = settings.verifying, calibration.settings
    described = settings.described
    if read_stages(stages).stages[0].checkpoint_path.resolve() != settings.checkpoint_path[0].resolve():
        described = {key: value for key, value in described.items() if key != "model_params"}  # of the first network
    return SamplerSettings(
        stages=stages,
        described=described,
        weights=settings.weights,
        autoencoder_checkpoint_path=settings.autoencoder_checkpoint_path,
        output_folder=samples,
        overwrite=settings.overwrite,
        seed=seed,
        n_samples=verifying.n_samples,
        batch_size=min(settings.batch_size, verifying.n_samples),
        allow_outside_range=settings.allow_outside_range,
        solver=settings.solver,
        speed=SpeedSettings(precision=measured.precision),
        machine=settings.machine,
    )


def scoring_of(settings: CalibrateSettings, samples: Path) -> ScoringSettings:
    from evaluation.settings import ReferenceSettings, ScoringSettings

    verifying, choice = settings.verifying, settings.choice
    real = ReferenceSettings(reference=verifying.reference)
    if verifying.reference is None:
        real = ReferenceSettings(dataset=choice.dataset, data_path=choice.data_path, crop=choice.crop)
    return ScoringSettings(
        samples_path=samples,
        real=real,
        feature_extractor=verifying.feature_extractor,
        feature_extractor_weights=verifying.feature_extractor_weights,
        machine=settings.machine,
    )


if __name__ == "__main__":
    main()
