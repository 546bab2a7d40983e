"""The settings of the sampling scripts. No torch in here."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from calibration.settings import CalibrationSettings
from common.errors import InputError
from common.options import MOST_BATCH, MOST_SEED, MachineSettings, SolverSettings, SpeedSettings
from common.settings import CONDITIONS, Checked, option, section

MOST_SAMPLES = 10_000_000
of_network, of_samples, of_stages, of_work = (
    partial(option, group=name) for name in ("networks", "samples", "stages", "less work")
)
AS_STAGES = "recorded as the stages that follow from it"
AS_NETWORKS = "recorded with the networks, by their SHA-256"


@dataclass(frozen=True, kw_only=True)
class RunSettings(Checked):
    """What both sampling scripts are told."""

    checkpoint_path: Path | None = of_network(
        None,
        "weights: .pth, .safetensors, or a folder of export.py or of diffusers",
        exists="path",
        decides=(),
        why=AS_NETWORKS,
    )
    config_path: Path | None = of_network(
        None,
        "YAML file of the network, for weights that came without a description",
        exists="file",
        decides=(),
        why=AS_NETWORKS,
    )
    weights: str = of_network(
        "ema", "which weights of a checkpoint", choices=("ema", "raw"), decides=(), why=AS_NETWORKS
    )
    autoencoder_checkpoint_path: Path | None = of_network(
        None,
        "of networks that make latents: autoencoder_kl.pth or a folder of diffusers; beats --config_path",
        exists="path",
        decides=(),
        why="recorded by its SHA-256",
    )
    described: dict = option(None, flag=False, decides=(), why=AS_NETWORKS)  # the network's own flags, nested
    output_folder: Path = of_samples(
        help="the images go here, all else to its report/", decides=(), why="where the images go"
    )
    overwrite: bool = of_samples(
        False, "replace the samples that are there", decides=(), why="it is about the images of before"
    )
    seed: int = of_samples(0, "sample i depends on this and i alone", least=0, most=MOST_SEED)
    n_samples: int = of_samples(
        None,
        "how many (default: --batch_size)",
        least=1,
        most=MOST_SAMPLES,
        decides=(),
        why="image i of a longer run is the same image",
    )
    batch_size: int = of_samples(
        128,
        "samples made at a time",
        least=1,
        most=MOST_BATCH,
        decides=(CONDITIONS,),
        why="another size differs in rounding alone",
    )
    class_id: tuple[int | Literal["random"], ...] = of_samples(
        ("random",),
        "random, or classes that follow each other in a circle (class-conditional networks)",
        least=0,
        most=10**6,
    )
    class_name: tuple[str, ...] = of_samples(
        (),
        'classes of ImageNet by name, such as "golden retriever", in place of --class_id; the network must number '
        "them by the sorted WordNet ids, as the public ones do",
        decides=(),
        why="recorded as the numbers of --class_id",
    )
    guidance_scale: float = of_samples(
        0.0,
        "s in cond + s (cond - uncond), 0 is off; the scales of DiT and SiT, in uncond + s (cond - uncond), are one "
        "more; needs a network with a class for none",
        least=0,
        most=1000,
        decides=(),
        why=AS_STAGES,
    )
    timesteps_save: tuple[int, ...] = of_samples((), "also save x_t at these t, to report/frames", least=0, most=99_999)
    allow_outside_range: bool = of_network(
        False,
        "let a network run at timesteps that it was not trained on (see --t_min of train.py)",
        decides=(),
        why="it permits; the stages decide",
    )
    solver: SolverSettings = section("solver", SolverSettings())
    speed: SpeedSettings = section("speed", SpeedSettings())
    machine: MachineSettings = section("machine", MachineSettings())

    @property
    def stated(self) -> dict[str, Any]:
        """The flags that describe the network, nested as a YAML file would have them."""
        path = self.autoencoder_checkpoint_path
        autoencoder = {"autoencoder": {"checkpoint_path": str(path)}} if path else {}
        return {**(self.described or {}), **autoencoder}

    def __post_init__(self) -> None:
        if self.n_samples is None:
            object.__setattr__(self, "n_samples", self.batch_size)
        object.__setattr__(self, "timesteps_save", tuple(sorted(set(self.timesteps_save), reverse=True)))
        super().__post_init__()
        if "random" in self.class_id and len(self.class_id) > 1:
            raise InputError("--class_id: give random alone, or whole numbers")
        if self.class_name and self.class_id != ("random",):
            raise InputError("--class_id and --class_name are two names of the same; give one of them")


@dataclass(frozen=True, kw_only=True)
class SamplerSettings(RunSettings):
    """Settings of sampler.py."""

    checkpoint_path_late: Path | None = of_network(
        None, "the full backbone; --checkpoint_path is then the shallow one", exists="path", decides=(), why=AS_NETWORKS
    )
    config_path_late: Path | None = of_network(
        None, "YAML file of the full backbone, like --config_path", exists="file", decides=(), why=AS_NETWORKS
    )
    t_switch: int | Literal["auto"] | None = of_stages(
        None,
        "timestep: the shallow backbone runs at every t > t_switch, the full one at the rest; auto: measured first",
        least=-1,
        most=99_999,
        decides=(),
        why=AS_STAGES,
    )
    logsnr_switch: float | None = of_stages(
        None,
        "--t_switch as a log-SNR, log (alpha bar / (1 - alpha bar)), which is the same point under any noise schedule",
        least=-100,
        most=100,
        decides=(),
        why=AS_STAGES,
    )
    guidance_scale_late: float | None = of_samples(
        None, "of the full backbone (default: --guidance_scale)", least=0, most=1000, decides=(), why=AS_STAGES
    )
    guidance_t_min: int | None = of_samples(
        None,
        "lowest t with guidance (default 0); without guidance the network runs once per step, not twice",
        least=0,
        most=99_999,
        decides=(),
        why=AS_STAGES,
    )
    guidance_t_max: int | None = of_samples(
        None, "highest t with guidance (default T - 1)", least=0, most=99_999, decides=(), why=AS_STAGES
    )
    stages: Path | None = of_stages(
        None,
        "YAML file with any number of networks and their timesteps, in place of --checkpoint_path",
        exists="file",
        decides=(),
        why=AS_STAGES,
    )
    cache_interval: int = of_work(
        1,
        "compute the middle blocks at every so many-th step of a stage, reuse their sum between",
        least=1,
        most=100_000,
    )
    cache_outer: int = of_work(
        1, "in blocks, and as many out blocks, that run at every step all the same", least=1, most=999
    )
    offload: bool = of_network(
        False,
        "keep idle networks in host memory (CUDA), which saves the device's",
        decides=(CONDITIONS,),
        why="it moves weights and changes none",
    )
    calibration: CalibrationSettings = section("for --t_switch auto", CalibrationSettings())

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_networks()
        self._check_calibration()
        self._check_guidance()
        if self.offload and self.speed.compile:
            raise InputError("--offload moves the weights that --compile records the places of; give one of them")

    def _check_networks(self) -> None:
        """End where the flags name no network, or name them twice."""
        of_two = ("config_path_late", "guidance_scale_late")
        if self.stages:
            for name in (
                "checkpoint_path",
                "config_path",
                "checkpoint_path_late",
                "t_switch",
                "logsnr_switch",
                *of_two,
            ):
                if getattr(self, name) is not None:
                    raise InputError(f"--{name} and --stages, which says which networks run when: give one of them")
            return
        if not self.checkpoint_path:
            raise InputError("give --checkpoint_path, or --stages")
        if self.t_switch is not None and self.logsnr_switch is not None:
            raise InputError("--t_switch and --logsnr_switch are two names of one point; give one of them")
        if (self.checkpoint_path_late is None) != (self.t_switch is None and self.logsnr_switch is None):
            raise InputError("--checkpoint_path_late and --t_switch (or --logsnr_switch) go together")
        for name in (*of_two, "offload"):
            if getattr(self, name) not in (None, False) and not self.checkpoint_path_late:
                raise InputError(f"--{name} needs --checkpoint_path_late")

    def _check_guidance(self) -> None:
        """End on an interval of guidance that is empty, or without guidance."""
        least, most = self.guidance_t_min, self.guidance_t_max
        if least is not None and most is not None and least > most:
            raise InputError(f"--guidance_t_min {least} is more than --guidance_t_max {most}")
        if (least is not None or most is not None) and not (
            self.guidance_scale or self.guidance_scale_late or self.stages
        ):
            raise InputError("--guidance_t_min and --guidance_t_max need --guidance_scale")

    def _check_calibration(self) -> None:
        """End on options of --t_switch auto without it, and on what it cannot do."""
        if self.t_switch != "auto":
            if self.calibration != CalibrationSettings():
                raise InputError(
                    "--dataset, --data_path, --crop, --n_images, --speedup, --budget belong to --t_switch auto"
                )
        elif not self.calibration.dataset:
            raise InputError("--t_switch auto: measures on real images; give --dataset")
        of_stages = (self.guidance_scale_late, self.guidance_t_min, self.guidance_t_max)
        if self.t_switch == "auto" and (self.offload or self.cache_interval > 1 or of_stages != (None, None, None)):
            raise InputError(
                "--t_switch auto: not with --offload, --cache_interval, --guidance_scale_late, --guidance_t_min or "
                "--guidance_t_max; run calibrate.py first"
            )


@dataclass(frozen=True, kw_only=True)
class EarlyExitSettings(RunSettings):
    """Settings of eesampler.py."""

    threshold: float = of_work(
        help="an image leaves at the first layer whose predicted uncertainty is at or below this", least=0, most=1
    )
    min_group: int = of_work(
        1,
        "images that left stay in the batch until so many wait",
        least=1,
        most=MOST_BATCH,
        decides=(CONDITIONS,),
        why="it changes the time alone",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.checkpoint_path is None:
            raise InputError("give --checkpoint_path")
        if self.min_group > self.batch_size:
            raise InputError(
                f"--min_group {self.min_group}: --batch_size {self.batch_size} never has so many to wait for"
            )
