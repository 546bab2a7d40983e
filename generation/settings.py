"""The settings of the sampling scripts. No torch in here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from common.errors import InputError
from common.options import MOST_BATCH, MOST_SEED, MachineSettings, SolverSettings, SpeedSettings
from common.settings import CONDITIONS, Checked, fields_of, option, section
from data import CROPS, DATASETS

MOST_SAMPLES = 10_000_000
of_network, of_samples, of_work = (partial(option, group=name) for name in ("networks", "samples", "less work"))
as_networks = partial(of_network, decides=(), why="recorded with the networks, by their SHA-256")
as_stages = partial(option, decides=(), why="recorded as the stages that follow from it")
of_stages, of_guidance = (partial(as_stages, group=name) for name in ("stages", "samples"))


def with_autoencoder(described: Mapping[str, Any], path: Path | None) -> dict[str, Any]:
    """The description of a network, nested as a YAML file would have it, with the path of its autoencoder if given."""
    return {**described, **({"autoencoder": {"checkpoint_path": str(path)}} if path else {})}


def check_there(name: str, path: Path | None) -> None:
    """Raises InputError for a path of the flag --name that does not exist."""
    if path is not None and not path.exists():
        raise InputError(f"--{name} {path}: no such file or folder")


@dataclass(frozen=True, kw_only=True)
class RunSettings(Checked):
    """Settings of both sampling scripts."""

    checkpoint_path: Path | None = as_networks(
        None, "weights of the network: a .pth or .safetensors file, or a folder of export.py or of diffusers"
    )
    config_path: Path | None = as_networks(
        None, "YAML file that describes the network, for weights without a description", exists="file"
    )
    weights: str = as_networks(
        "ema", "ema for averaged weights, raw for those of the last step", choices=("ema", "raw")
    )
    autoencoder_checkpoint_path: Path | None = of_network(
        None,
        "autoencoder of a network of latents: autoencoder_kl.pth or a folder of diffusers; overrides --config_path",
        exists="path",
        decides=(),
        why="recorded by its SHA-256",
    )
    described: Mapping[str, Any] = as_networks({}, flag=False)  # the network's flags, nested
    output_folder: Path = of_samples(
        help="folder for the images; all other files go to the report/ in it",
        decides=(),
        why="it is only the place of the images",
    )
    overwrite: bool = of_samples(False, "replace existing samples", decides=(), why="it only removes earlier images")
    seed: int = of_samples(0, "seed of the noise; sample i depends only on the seed and i", least=0, most=MOST_SEED)
    n_samples: int = of_samples(
        None,
        "number of samples (default: --batch_size)",
        least=1,
        most=MOST_SAMPLES,
        decides=(),
        why="image i of a longer run is the same image",
    )
    batch_size: int = of_samples(
        128,
        "samples per batch",
        least=1,
        most=MOST_BATCH,
        decides=(CONDITIONS,),
        why="another size changes only the rounding",
    )
    class_id: tuple[int | Literal["random"], ...] = of_samples(
        ("random",),
        "classes of the samples: random, or numbers that repeat in this order",
        least=0,
        most=10**6,
    )
    class_name: tuple[str, ...] = of_samples(
        (),
        'classes of ImageNet by name, such as "golden retriever", instead of --class_id; the classes of the '
        "network must be in the order of the sorted WordNet ids, as in the public networks",
        decides=(),
        why="recorded as the numbers of --class_id",
    )
    guidance_scale: float = of_guidance(
        0.0,
        'scale s of classifier-free guidance, cond + s (cond - uncond); needs a network with a "no class"; 0 turns '
        "guidance off; the published scale of DiT and SiT is s + 1",
        least=0,
        most=1000,
    )
    timesteps_save: tuple[int, ...] = of_samples(
        (), "also save x_t at these timesteps, in report/frames", least=0, most=99_999
    )
    allow_outside_range: bool = of_network(
        False,
        "let networks run at timesteps on which they were not trained (see --t_min of train.py)",
        decides=(),
        why="it only permits stages, which are recorded",
    )
    solver: SolverSettings = section("solver", SolverSettings())
    speed: SpeedSettings = section("speed", SpeedSettings())
    machine: MachineSettings = section("machine", MachineSettings())

    @property
    def stated(self) -> dict[str, Any]:
        """The flags that describe the network, nested as a YAML file would have them."""
        return with_autoencoder(self.described, self.autoencoder_checkpoint_path)

    def __post_init__(self) -> None:
        if self.n_samples is None:
            object.__setattr__(self, "n_samples", self.batch_size)
        object.__setattr__(self, "timesteps_save", tuple(sorted(set(self.timesteps_save), reverse=True)))
        super().__post_init__()
        if "random" in self.class_id and len(self.class_id) > 1:
            raise InputError("--class_id: give random alone, or whole numbers")
        if self.class_name and self.class_id != ("random",):
            raise InputError("--class_id and --class_name both choose the classes; give one of them")


@dataclass(frozen=True, kw_only=True)
class CalibrationSettings(Checked):
    """Choice of the switch."""

    dataset: str | None = option(
        None, "real images to measure on, preferably the training set", choices=tuple(DATASETS)
    )
    data_path: Path | None = option(
        None,
        "path of the dataset (default: datasets/)",
        exists="path",
        decides=(),
        why="the same images may be in another place",
    )
    crop: str | None = option(None, "crop of the dataset (default: the crop of the networks)", choices=CROPS)
    n_images: int = option(256, "number of real images, or of sampled paths, to measure on", least=2, most=10_000_000)
    paths: str = option(
        "data",
        "paths on which a plan is measured: data for the forward process of real images, sampled for the sampling "
        "paths of the full network",
        choices=("data", "sampled"),
    )
    speedup: float | None = option(
        None,
        "choose the switch of least divergence with at least this speed-up, which is predicted from calls without "
        "--compile (default: the knee of the curve)",
        least=1,
        most=1e6,
    )
    seconds: float | None = option(
        None,
        "choose the plan of least divergence that takes at most this many seconds per image",
        least=0,
        most=1e9,
        above=True,
    )
    budget: float | None = option(
        None,
        "choose the fastest option with at most this divergence, in nats per dimension, or for deterministic solvers "
        "in squared shift per dimension",
        least=0,
        most=1e12,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in ("speedup", "seconds", "budget") if getattr(self, name) is not None]
        if len(given) > 1:
            raise InputError(f"--{given[0]} and --{given[1]} are two rules for one choice; give one of them")

    def check_for_switch(self) -> None:
        """Raises InputError for options that belong to a plan."""
        if self.paths != "data":
            raise InputError("--paths belongs to a plan (--plan); a switch is measured on real images")
        if self.seconds is not None:
            raise InputError("--seconds belongs to a plan (--plan); give --speedup or --budget")

    def check_images(self, for_what: str) -> None:
        """Raises InputError without real images, unless the paths need none."""
        if not self.dataset and self.paths == "data":
            raise InputError(f"{for_what} measures on real images; give --dataset")


INTERVALS = ("correct_every", "reuse_every", "hold_every")


@dataclass(frozen=True, kw_only=True)
class SavingSettings(Checked):
    """How a stage saves work: it computes a slowly changing quantity at every k-th step and forecasts it between them.

    The order of a forecast is 0 to hold the last value, 1 to follow the line through the last two.
    """

    correct_every: int = as_stages(
        1,
        "run the full backbone at every n-th step, and between them the shallow one, corrected by a forecast of their "
        "difference; 1 turns this off",
        least=1,
        most=100_000,
    )
    correct_order: int | None = as_stages(
        None, "order of the forecast of --correct_every, 0 or 1 (default: 1)", least=0, most=1
    )
    reuse_every: int = as_stages(
        1,
        "run the middle blocks at every n-th step of a stage, and between them reuse what they add; 1 turns this off",
        aliases=("--cache_interval",),
        least=1,
        most=100_000,
    )
    reuse_order: int | None = as_stages(
        None, "order of the forecast of --reuse_every, 0 or 1 (default: 0)", least=0, most=1
    )
    reuse_outer: int | None = as_stages(
        None,
        "number of blocks at either end that run at every step (default: 1)",
        aliases=("--cache_outer",),
        least=1,
        most=999,
    )
    hold_every: int = as_stages(
        1,
        "run the network at every n-th step, and between them forecast the noise that it predicts; 1 turns this off",
        least=1,
        most=100_000,
    )
    hold_order: int | None = as_stages(
        None, "order of the forecast of --hold_every, 0 or 1 (default: 1)", least=0, most=1
    )
    exit_layer: int | None = as_stages(
        None,
        "number of blocks after which all images leave an early-exit model; no probe runs then",
        least=0,
        most=9_999,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        used = [name for name in INTERVALS if getattr(self, name) > 1]
        if len(used) > 1:
            raise InputError(f"{used[0]} and {used[1]} are two ways to save the same calls; give one of them")
        for name, default in (("correct_order", 1), ("reuse_order", 0), ("reuse_outer", 1), ("hold_order", 1)):
            interval = f"{name.split('_')[0]}_every"
            if interval not in used and getattr(self, name) is not None:
                raise InputError(f"{name} needs a {interval} of 2 or more")
            if interval in used and getattr(self, name) is None:
                object.__setattr__(self, name, default)
        if self.exit_layer is not None and self.reuse_every > 1:
            raise InputError("exit_layer and reuse_every are two ways to skip blocks; give one of them")

    @property
    def described(self) -> dict[str, int]:
        """The values that have an effect."""
        return {f.name: getattr(self, f.name) for f in fields_of(SavingSettings) if getattr(self, f.name) != f.default}


@dataclass(frozen=True, kw_only=True)
class SamplerSettings(RunSettings):
    """Settings of sampler.py."""

    checkpoint_path_late: Path | None = as_networks(
        None, "weights of the full backbone; --checkpoint_path then names the shallow one"
    )
    config_path_late: Path | None = as_networks(None, "YAML file that describes the full backbone", exists="file")
    download: str | None = as_networks(
        None,
        "repository of the Hugging Face hub, OWNER/NAME, to download as --checkpoint_path if that is missing; a "
        "folder of diffusers, of which only descriptions and safetensors are downloaded",
        metavar="REPO",
    )
    download_late: str | None = as_networks(
        None, "repository to download as --checkpoint_path_late, see --download", metavar="REPO"
    )
    t_switch: int | Literal["auto"] | None = of_stages(
        None,
        "timestep of the switch: the shallow backbone runs at every t > t_switch, the full one at all others; auto "
        "chooses it by measurement",
        least=-1,
        most=99_999,
    )
    plan: str | None = of_stages(
        None,
        "auto measures all ways to save work, and samples with the best plan for --speedup, --seconds or --budget",
        choices=("auto",),
    )
    logsnr_switch: float | None = of_stages(
        None,
        "switch at this log-SNR, log(alpha bar / (1 - alpha bar)), instead of --t_switch; it is the same for any "
        "noise schedule",
        least=-100,
        most=100,
    )
    guidance_scale_late: float | None = of_guidance(
        None, "guidance scale of the full backbone (default: --guidance_scale)", least=0, most=1000
    )
    guidance_t_min: int | None = of_guidance(
        None,
        "lowest t with guidance; without guidance the network runs once per step, not twice (default: 0)",
        least=0,
        most=99_999,
    )
    guidance_t_max: int | None = of_guidance(None, "highest t with guidance (default: T - 1)", least=0, most=99_999)
    stages: Path | None = of_stages(
        None,
        "YAML file that names any number of networks and their timesteps, instead of --checkpoint_path",
        aliases=("--schedule",),
        exists="file",
    )
    offload: bool = of_network(
        False,
        "keep a network in memory only during its own stages; when a stage begins, its network is read from its file "
        "(on CUDA from host memory); the file must not change during the run",
        decides=(CONDITIONS,),
        why="it moves weights and changes none",
    )
    saving: SavingSettings = section("less work, in the last stage", SavingSettings())
    calibration: CalibrationSettings = section("for --t_switch auto and --plan auto", CalibrationSettings())

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_networks()
        self._check_calibration()
        self._check_guidance()
        if self.offload and self.speed.compile:
            raise InputError("--offload moves the weights, but --compile records their addresses; give one of them")

    def _check_networks(self) -> None:
        """Raises InputError if the flags name no network, or name one twice."""
        of_two = ("config_path_late", "guidance_scale_late", "download_late")
        if self.stages:
            networks = ("checkpoint_path", "config_path", "checkpoint_path_late", "download", *of_two)
            for name in (*networks, "t_switch", "logsnr_switch", "plan"):
                if getattr(self, name) is not None:
                    raise InputError(
                        f"--{name} and --stages, which assigns the networks to timesteps: give one of them"
                    )
            for name in self.saving.described:
                if not name.startswith("reuse_"):
                    raise InputError(
                        f"--{name} and --stages, which defines how each stage saves work: give one of them"
                    )
            return
        if not self.checkpoint_path:
            raise InputError("give --checkpoint_path, or --stages")
        if self.t_switch is not None and self.logsnr_switch is not None:
            raise InputError("--t_switch and --logsnr_switch both set the switch; give one of them")
        if self.plan is not None:
            self._check_plan()
        elif (self.checkpoint_path_late is None) != (self.t_switch is None and self.logsnr_switch is None):
            raise InputError("--checkpoint_path_late and --t_switch (or --logsnr_switch) go together")
        if self.saving.correct_every > 1 and not self.checkpoint_path_late:
            raise InputError("--correct_every needs --checkpoint_path_late, the network that corrects the shallow one")
        for name in (*of_two, "offload"):
            if getattr(self, name) not in (None, False) and not self.checkpoint_path_late:
                raise InputError(f"--{name} needs --checkpoint_path_late")
        fetched = [folder for _, folder in self.downloads]
        for name in ("checkpoint_path", "checkpoint_path_late"):
            if (path := getattr(self, name)) not in fetched:
                check_there(name, path)

    @property
    def downloads(self) -> list[tuple[str, Path]]:
        """The repositories to fetch, each with its folder."""
        both = ((self.download, self.checkpoint_path), (self.download_late, self.checkpoint_path_late))
        return [(repo, folder) for repo, folder in both if repo is not None and folder is not None]

    def _check_plan(self) -> None:
        """Raises InputError for options that --plan auto decides, or does not support."""
        for name in ("t_switch", "logsnr_switch", "guidance_scale_late", "guidance_t_min", "guidance_t_max"):
            if getattr(self, name) is not None:
                raise InputError(f"--{name} and --plan auto, which chooses the stages: give one of them")
        for name in self.saving.described:
            raise InputError(f"--{name} and --plan auto, which chooses how to save work: give one of them")
        if self.offload:
            raise InputError("--plan auto needs all networks in memory at once; leave out --offload")

    def _check_guidance(self) -> None:
        """Raises InputError for an interval of guidance without guidance."""
        interval = self.guidance_t_min, self.guidance_t_max
        if interval != (None, None) and not (self.guidance_scale or self.guidance_scale_late or self.stages):
            raise InputError("--guidance_t_min and --guidance_t_max need --guidance_scale")

    def _check_calibration(self) -> None:
        """Raises InputError for options that need --t_switch auto, or that it does not support."""
        if self.plan is not None:
            self.calibration.check_images("--plan auto:")
            return
        if self.t_switch != "auto":
            for f in fields_of(CalibrationSettings):
                if getattr(self.calibration, f.name) != f.default:
                    raise InputError(f"--{f.name} belongs to --t_switch auto or --plan auto")
            return
        self.calibration.check_for_switch()
        self.calibration.check_images("--t_switch auto:")
        of_stages = (self.guidance_scale_late, self.guidance_t_min, self.guidance_t_max)
        if used := [name for name in self.saving.described if name.endswith("_every") or name == "exit_layer"]:
            raise InputError(
                f"--t_switch auto does not support --{used[0]}; run calibrate.py first, or give --plan auto"
            )
        if self.offload or of_stages != (None, None, None):
            raise InputError(
                "--t_switch auto does not support --offload, --guidance_scale_late, --guidance_t_min or "
                "--guidance_t_max; run calibrate.py first"
            )


@dataclass(frozen=True, kw_only=True)
class EarlyExitSettings(RunSettings):
    """Settings of eesampler.py."""

    threshold: float = of_work(
        help="an image exits at the first layer whose predicted uncertainty is at or below this value", least=0, most=1
    )
    min_group: int = of_work(
        1,
        "remove images that exited from the batch in groups of at least this size",
        least=1,
        most=MOST_BATCH,
        decides=(CONDITIONS,),
        why="it changes only the time",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.checkpoint_path is None:
            raise InputError("give --checkpoint_path")
        check_there("checkpoint_path", self.checkpoint_path)
        if self.min_group > self.batch_size:
            raise InputError(f"--min_group {self.min_group}: --batch_size {self.batch_size} has fewer images")
