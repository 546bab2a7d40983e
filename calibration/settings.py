"""The settings of a calibration, for calibrate.py and sampler.py. No torch in here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from common.config import PRECISIONS
from common.errors import InputError
from common.options import MOST_BATCH, MOST_SEED, PRECISION, MachineSettings, SolverSettings
from common.settings import Checked, flat, option, plain, section
from generation.settings import CalibrationSettings, with_autoencoder


@dataclass(frozen=True, kw_only=True)
class VerifySettings(Checked):
    """Sampling and scoring of switches."""

    verify: int | None = option(
        None, "sample and score this many switches, including the chosen one", least=2, most=100_000
    )
    n_samples: int = option(1000, "number of samples for each switch and seed", least=2, most=10_000_000)
    sample_seeds: tuple[int, ...] = option(
        (0,), "seeds of the samples, the same for every switch", least=0, most=MOST_SEED
    )
    reference: Path | None = option(
        None, "real images to score against, as for fid.py (default: --dataset)", exists="path"
    )
    feature_extractor: str = option("inception", "network whose features are compared, as for fid.py")
    feature_extractor_weights: Path | None = option(
        None, "weights of inception, as for fid.py (default: downloaded once)", exists="file"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.sample_seeds)) < len(self.sample_seeds):
            raise InputError("--sample_seeds: give each seed only once")
        if self.verify is None:
            for name, value in flat(self).items():
                if value != plain(type(self).__dataclass_fields__[name].default):
                    raise InputError(f"--{name} needs --verify")


@dataclass(frozen=True, kw_only=True)
class CalibrateSettings(Checked):
    """Settings of calibrate.py."""

    checkpoint_path: tuple[Path, ...] = option(
        help="weights of the networks, from small to large; a switch needs at least two, a plan at least one",
        exists="path",
    )
    plan: bool = option(
        False,
        "choose the best plan: besides the network of each timestep also corrections, exit layers, reused middle "
        "blocks and held predictions",
    )
    config_path: tuple[Path | Literal["none"], ...] = option(
        (), 'YAML files that describe the networks, "none" for weights with a description'
    )
    weights: str = option("ema", "ema for averaged weights, raw for those of the last step", choices=("ema", "raw"))
    batch_size: int = option(
        128, "number of images per network call; calls of this size are timed", least=1, most=MOST_BATCH
    )
    autoencoder_checkpoint_path: Path | None = option(
        None,
        "autoencoder of networks of latents; it encodes images that are not packed as latents, decodes the samples of "
        "--verify, and overrides --config_path",
        exists="path",
    )
    seed: int = option(0, "seed of the images and their noise", least=0, most=MOST_SEED)
    precision: str | None = option(None, PRECISION, choices=PRECISIONS)
    guidance_scale: float = option(0.0, "scale of guidance to measure with, as for sampler.py", least=0, most=1000)
    free: bool = option(False, "let the networks run in any order, not only the given one")
    allow_outside_range: bool = option(False, "let networks run at timesteps on which they were not trained")
    output: Path = option(Path("calibration.yaml"), "file of stages to write; a .json and a .png go to the same folder")
    overwrite: bool = option(
        False, "replace an --output that is not from calibrate.py, and --verify samples with other settings"
    )
    described: Mapping[str, Any] = option({}, flag=False)  # the networks' own flags, nested
    choice: CalibrationSettings = section("images and rule of the choice")
    solver: SolverSettings = section("solver", SolverSettings())
    verifying: VerifySettings = section("sampling and scoring of switches", VerifySettings())
    machine: MachineSettings = section("machine", MachineSettings())

    def __post_init__(self) -> None:
        super().__post_init__()
        count = len(self.checkpoint_path)
        if count < 2 and not self.plan:
            raise InputError("--checkpoint_path: give two networks or more, the full one last")
        if self.config_path and len(self.config_path) != count:
            raise InputError(
                f"--config_path: give one for each of the {count} networks, or none for a network that needs no file"
            )
        if self.output.suffix not in (".yaml", ".yml"):
            raise InputError(f"--output {self.output}: wanted a .yaml")
        if self.plan:
            if self.free or self.verifying.verify:
                raise InputError(f"--{'free' if self.free else 'verify'} and --plan: give one of them")
        else:
            self.choice.check_for_switch()
        self.choice.check_images("a calibration")

    @property
    def stated(self) -> dict[str, Any]:
        """The flags that describe the networks, nested as a YAML file would have them."""
        return with_autoencoder(self.described, self.autoencoder_checkpoint_path)

    @property
    def files(self) -> list[tuple[Path, Path | None]]:
        """Weights and description of each network."""
        described = [None if path == "none" else Path(path) for path in self.config_path]
        return list(zip(self.checkpoint_path, described or [None] * len(self.checkpoint_path), strict=True))


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The settings of a measurement and of the choice, for `calibration.run.calibrate`."""

    choice: CalibrationSettings
    solver: SolverSettings
    precision: str  # a key of common.devices.DTYPES
    batch_size: int  # images per network call; calls of this size are timed
    seed: int  # seed of the images and their noise
    guidance_scale: float = 0.0
    allow_outside_range: bool = False  # run networks at timesteps on which they were not trained
    free: bool = False  # allow any order of the networks
    quiet: bool = False
