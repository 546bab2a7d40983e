"""The description of a network: its architecture, its output and its noise schedule.

One description serves the YAML files, the command line and the checkpoints. No torch in here, so that --help stays
quick.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from common.errors import InputError
from common.files import check_regular
from common.settings import Checked, build, check_types, differences, option, plain, section, shown

BACKBONES = ("uvit", "dit")  # the networks that this project can train
TRAINABLE = (*BACKBONES, "deediff_uvit")
MODELS = (*TRAINABLE, "diffusers")
PARAMETRIZATIONS = ("predict_noise", "predict_original", "predict_previous", "predict_v", "predict_velocity")
PRECISIONS = ("fp32", "bf16", "fp16")
PUBLIC_SCALE_FACTOR = 0.18215  # scale of the latents of the public U-ViT weights
MOST_YAML_BYTES = 2**20
WITHOUT_NUMBERS = ("cosine", "rectified_flow")  # schedules without beta_start and beta_end
BETA_SCHEDULES = ("linear", "scaled_linear", "continuous_vp", *WITHOUT_NUMBERS)
# For --sampling_schedule: the betas of latent diffusion for scaled_linear, those of DDPM for the others.
SAMPLING_SCHEDULES: dict[str, dict[str, Any]] = {
    name: {"beta_schedule": name, "beta_start": 1e-4, "beta_end": 0.02} for name in BETA_SCHEDULES
} | {"scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}}
TASK = "task of the network (overrides --config_path)"  # a group of --help
CLASSIFIER_TYPES = (
    "attention_probe",
    "mlp_probe_per_layer",
    "mlp_probe_per_timestep",
    "mlp_probe_per_layer_per_timestep",
)


class BackboneConfig(Checked):
    """What the configurations of all backbones have, beside num_blocks and image_shape (C, H, W)."""

    num_classes: int
    normalize_timesteps = False

    @property
    def no_class(self) -> int | None:
        """The index of the class that always means "no class"; None if there is none, but see `Config.no_class`."""
        return None

    @property
    def num_labels(self) -> int:
        """The classes that y may be, "no class" among them; 0 for an unconditional network."""
        return max(0, self.num_classes) + (self.no_class is not None)


@dataclass(frozen=True, kw_only=True)
class UViTConfig(BackboneConfig):
    """One U-ViT backbone. The fields are the keys of `model_params` in the YAML files and the arguments of UViT."""

    img_size: int = option(
        help="side of the images, in pixels, or in latent cells with an autoencoder", least=1, most=4096
    )
    patch_size: int = option(help="side of a patch, in the unit of the image", least=1, most=4096)
    in_chans: int = option(3, "channels of the images, 3 for colour and 1 for grey", least=1, most=256)
    embed_dim: int = option(512, "width of the tokens", least=1, most=16384)
    # depth // 2 in blocks, one middle block, depth // 2 out blocks: 12 and 13 are the same network, stored as 13.
    depth: int = option(13, "number of blocks; an even depth is raised by one", least=1, most=999)
    num_heads: int = option(8, "number of attention heads", least=1, most=1024)
    mlp_ratio: float = option(4.0, "width of the MLPs divided by the width of the tokens", least=0, most=64, above=True)
    qkv_bias: bool = option(False, "give the projections to queries, keys and values a bias")
    mlp_time_embed: bool = option(False, "pass the timestep embedding through an MLP")
    num_classes: int = option(-1, "number of classes; -1 for an unconditional network", least=-1, most=1_000_000)
    normalize_timesteps: bool = option(False, "divide the time input by 1000")
    conv: bool = option(True, "end with a 3 x 3 convolution, which the public huge weights lack")

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "depth", self.depth // 2 * 2 + 1)
        check_multiple("img_size", self.img_size, patch_size=self.patch_size)
        check_multiple("embed_dim", self.embed_dim, num_heads=self.num_heads, two=2)
        check_num_classes(self.num_classes)

    @property
    def num_blocks(self) -> int:
        return self.depth

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.in_chans, self.img_size, self.img_size


@dataclass(frozen=True, kw_only=True)
class DiTConfig(BackboneConfig):
    """One DiT or SiT backbone. The fields are the arguments of DiT; the defaults are those of DiT-XL/2 at 256."""

    input_size: int = option(
        32, "side of the input, in pixels, or in latent cells with an autoencoder", least=1, most=4096
    )
    patch_size: int = option(2, "side of a patch, in the unit of the image", least=1, most=4096)
    in_channels: int = option(4, "channels of the input", least=1, most=256)
    hidden_size: int = option(1152, "width of the tokens", least=1, most=16384)
    depth: int = option(28, "number of blocks", least=1, most=999)
    num_heads: int = option(16, "number of attention heads", least=1, most=1024)
    mlp_ratio: float = option(4.0, "width of the MLPs divided by the width of the tokens", least=0, most=64, above=True)
    # More than 0: the network has one more class, num_classes, which means "no class".
    class_dropout_prob: float = option(
        0.1, 'probability of "no class" instead of the class in training', least=0, most=1
    )
    num_classes: int = option(
        1000, 'number of classes without "no class"; -1 for an unconditional network', least=-1, most=1_000_000
    )
    # False accepts weights with and without a variance.
    learn_sigma: bool = option(False, "the weights also predict a variance, which is ignored")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_multiple("input_size", self.input_size, patch_size=self.patch_size)
        check_multiple("hidden_size", self.hidden_size, num_heads=self.num_heads, four=4)
        check_num_classes(self.num_classes)

    @property
    def num_blocks(self) -> int:
        return self.depth

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.in_channels, self.input_size, self.input_size

    @property
    def no_class(self) -> int | None:
        return self.num_classes if self.num_classes > 0 and self.class_dropout_prob else None


@dataclass(frozen=True, kw_only=True)
class DiffusersConfig(BackboneConfig):
    """A network in a folder of diffusers, without its architecture, which the folder has."""

    network: str = option(
        flag=False, help="class of the network in diffusers", choices=("UNet2DModel", "DiTTransformer2DModel")
    )
    sample_size: int = option(flag=False, help="side of the images or latents", least=1, most=4096)
    in_channels: int = option(flag=False, help="channels", least=1, most=256)
    num_blocks: int = option(flag=False, help="transformer blocks, or levels of a U-Net", least=1, most=999)
    num_classes: int = option(-1, 'without "no class"; -1: unconditional', flag=False, least=-1, most=1_000_000)
    has_no_class: bool = option(False, 'one more class, num_classes, means "no class"', flag=False)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.in_channels, self.sample_size, self.sample_size

    @property
    def no_class(self) -> int | None:
        return self.num_classes if self.has_no_class else None


def check_multiple(name: str, value: int, **divisors: int) -> None:
    """Raises InputError unless the value is a multiple of each divisor."""
    for of, divisor in divisors.items():
        if value % divisor:
            number = f"{of}={divisor}" if of.islower() and "_" in of else str(divisor)
            raise InputError(f"{name}={value} is no multiple of {number}")


def check_num_classes(num_classes: int) -> None:
    if num_classes == 0:
        raise InputError("num_classes=0: give -1 (unconditional) or 1 and more")


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig(Checked):
    """The noise schedule and the time input of a network: the keys of `diffusion_params`.

    beta_schedule: betas linear, or linear in their square root (scaled_linear), from beta_start to beta_end; or those
    between T points of the continuous VP process (continuous_vp), whose beta rises from T beta_start to T beta_end in
    time 0..1; or those of the squared cosine (cosine; Nichol and Dhariwal 2021, Eq. 17, betas of at most 0.999); or
    those of the variance-preserving process that has, at the times s = (t + 1/2) / T, the signal-to-noise ratio of
    rectified flow, x_s = (1 - s) x0 + s eps (rectified_flow; Liu et al. 2023). The last two ignore beta_start and
    beta_end.

    The network's time input is time_scale * (t + time_shift), or with toward_data time_scale * (T - t - time_shift),
    see `diffusion.time_input`. The public U-ViT weights expect 0.999 (t + 1), which is 999 times the continuous time,
    or t + 1; SiT 1 - (t + 1/2) / 1000. toward_data: the network's time and velocity run from noise to data, as in SiT.
    """

    num_timesteps: int = option(1000, "number of timesteps T of the noise schedule", least=1, most=100_000)
    beta_schedule: str = option("linear", "form of the noise schedule over t", choices=BETA_SCHEDULES)
    beta_start: float = option(1e-4, "beta at t = 0", least=0, most=1, above=True)
    beta_end: float = option(0.02, "beta at t = T - 1", least=0, most=1, above=True)
    time_scale: float = option(
        1.0, "scale of the time input, which is time_scale * (t + time_shift)", least=0, most=1000, above=True
    )
    time_shift: float = option(0.0, "shift of the time input, see --time_scale", least=-1000, most=1000)
    toward_data: bool = option(False, "the network's time and velocity run from noise to data, as in SiT")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.beta_start <= self.beta_end < 1:
            raise InputError(f"beta_start={self.beta_start}, beta_end={self.beta_end}: wanted start <= end < 1")

    @property
    def time_line(self) -> tuple[float, float]:
        """(scale, shift) of the network's time input, scale * (t + shift)."""
        if self.toward_data:
            return -self.time_scale, self.time_shift - self.num_timesteps
        return self.time_scale, self.time_shift

    @property
    def schedule(self) -> dict[str, Any]:
        """The arguments of NoiseSchedule."""
        names = ("num_timesteps", "beta_schedule", "beta_start", "beta_end")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig(Checked):
    """The autoencoder between the network's latents and images: the keys of `autoencoder`."""

    scale_factor: float = option(  # makes the standard deviation of latents about 1
        PUBLIC_SCALE_FACTOR, "factor by which latents are multiplied", least=0, most=1000, above=True
    )
    checkpoint_path: str | None = None  # not stored in checkpoints: the path differs between machines


@dataclass(frozen=True, kw_only=True)
class Config(Checked):
    """The description of a network in YAML files and checkpoints.

    Defaults that depend on other fields are filled in: real_classes, t_min and t_max are None only where they do not
    apply.
    """

    model: str = option("uvit", choices=MODELS, flag=False)
    model_params: UViTConfig | DiTConfig | DiffusersConfig = section(
        "architecture of the network (overrides --config_path)",
        kinds={"uvit": UViTConfig, "dit": DiTConfig, "deediff_uvit": UViTConfig, "diffusers": DiffusersConfig},
        chosen_by="model",
    )
    classifier_type: str | None = option(
        None, "kind of the probes of an early-exit model", choices=CLASSIFIER_TYPES, group=TASK
    )
    parametrization: str = option("predict_noise", "what the network predicts", choices=PARAMETRIZATIONS, group=TASK)
    diffusion_params: DiffusionConfig = section("noise schedule of the network", DiffusionConfig())
    autoencoder: AutoencoderConfig | None = option(None, flag=False)  # None: the network makes pixels
    dataset: str | None = option(None, flag=False)  # the training data
    crop: str | None = option(None, flag=False)  # how its images were made square, see data.transforms
    real_classes: int = option(
        None,
        'number of classes that have images; a further class means "no class" (default: all)',
        least=0,
        most=10**6,
        group=TASK,
    )
    t_min: int = option(0, "lowest timestep of training", least=0, most=99_999, group=TASK)
    t_max: int = option(None, "highest timestep of training (default: T - 1)", least=0, most=99_999, group=TASK)

    def __post_init__(self) -> None:
        num_classes, last = self.model_params.num_classes, self.diffusion_params.num_timesteps - 1
        if self.real_classes is None:
            object.__setattr__(self, "real_classes", max(0, num_classes))
        if self.t_max is None:
            object.__setattr__(self, "t_max", last)
        super().__post_init__()
        if self.model == "deediff_uvit":
            check_choice("classifier_type", self.classifier_type, CLASSIFIER_TYPES)
        elif self.classifier_type is not None:
            raise InputError(f"classifier_type={self.classifier_type} needs model deediff_uvit, not {self.model}")
        if not min(1, num_classes) <= self.real_classes <= max(0, num_classes):
            raise InputError(f"real_classes={self.real_classes}: wanted 1..num_classes={num_classes}")
        if self.diffusion_params.toward_data and self.parametrization != "predict_velocity":
            raise InputError(
                f"parametrization={self.parametrization}: a flow network whose time runs toward the data predicts its "
                "velocity; give predict_velocity, or leave toward_data out"
            )
        if not self.t_min <= self.t_max <= last:
            raise InputError(f"t_min={self.t_min}, t_max={self.t_max}: wanted 0 <= t_min <= t_max <= {last}")

    @property
    def classes(self) -> range:
        """The classes with images; empty for an unconditional network."""
        return range(self.real_classes)

    @property
    def trained_timesteps(self) -> range:
        """The timesteps on which the network was trained."""
        return range(self.t_min, self.t_max + 1)

    @property
    def no_class(self) -> int | None:
        """The index of "no class"; None if the network has no such class."""
        if self.model_params.no_class is not None:
            return self.model_params.no_class
        one_more = self.classes and len(self.classes) == self.model_params.num_labels - 1
        return len(self.classes) if one_more else None

    @property
    def conventions(self) -> str:
        """The noise schedule and the time input, as text for messages."""
        diffusion, normalize = self.diffusion_params, self.model_params.normalize_timesteps
        scale, shift = diffusion.time_line
        told = f"t {'-' if shift < 0 else '+'} {abs(shift):g}" if shift else "t"
        if shift and (scale != 1 or normalize):
            told = f"({told})"
        told = f"{'' if scale == 1 else f'{scale:g} '}{told}{' / 1000' if normalize else ''}"
        betas = f" {diffusion.beta_start:g}..{diffusion.beta_end:g}"
        if diffusion.beta_schedule in WITHOUT_NUMBERS:
            betas = ""
        return f"{diffusion.beta_schedule} betas{betas}, time input {told} for t = 0..{diffusion.num_timesteps - 1}"


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"{name}={value}: choose one of {', '.join(choices)}")


# Numbers that YAML 1.1 reads in an unexpected way: 1:30 is 90, and 010 is 8.
AMBIGUOUS_NUMBER = re.compile(r".*:.*|[-+]?0[\d_]+")


class _PlainLoader(yaml.SafeLoader):  # type: ignore[misc]  # yaml ships no types
    """Loads plain values without aliases: nested aliases could fill the memory from a few lines.

    A key that is given twice is an error, and numbers that YAML 1.1 reads in an unexpected way are text.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "aliases (*) are not allowed", self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        keys = [key for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
        for key in (key for key in keys if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                problem = f"the key {shown(key.value)} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping

    def construct_yaml_int(self, node: yaml.Node) -> int | str:
        text: str = self.construct_scalar(node)
        return text if AMBIGUOUS_NUMBER.fullmatch(text) else int(super().construct_yaml_int(node))

    def construct_yaml_float(self, node: yaml.Node) -> float | str:
        text: str = self.construct_scalar(node)
        return text if AMBIGUOUS_NUMBER.fullmatch(text) else float(super().construct_yaml_float(node))


_PlainLoader.add_constructor("tag:yaml.org,2002:int", _PlainLoader.construct_yaml_int)
_PlainLoader.add_constructor("tag:yaml.org,2002:float", _PlainLoader.construct_yaml_float)

# Keys of the original authors' files, and their keys here.
ORIGINAL_PLACES = {
    ("model_params", "classifier_type"): (None, "classifier_type"),
    ("autoencoder", "autoencoder_checkpoint_path"): ("autoencoder", "checkpoint_path"),
}


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings in a YAML file as nested dicts; sections and keys are checked, defaults are not filled in.

    Also reads the original authors' files. Raises InputError for a file without a YAML mapping, an unknown key or a
    value of the wrong type.
    """
    given = read_mapping(path, "model_params", dict)
    for (part, key), (own_part, own_key) in ORIGINAL_PLACES.items():
        if isinstance(given.get(part), dict) and key in given[part]:
            value = given[part].pop(key)
            own = given if own_part is None else given[own_part]
            if own.get(own_key) is None:
                own[own_key] = value
            elif value not in (None, own[own_key]):
                raise InputError(
                    f"{path}: {part}.{key} {shown(value)} contradicts {own_key} {shown(own[own_key])}; leave one out"
                )
    return check_types(Config, given, str(path))


def read_mapping(path: Path, section: str, kind: type) -> dict[Any, Any]:
    """The mapping of plain values in a YAML file. section, kind: a required key and its type; no other key is checked.

    Raises InputError for other files.
    """
    check_regular(path)
    try:
        if (size := path.stat().st_size) > MOST_YAML_BYTES:
            raise InputError(f"{path}: {size:,} bytes; a YAML file may have at most {MOST_YAML_BYTES:,}")
        given = yaml.load(path.read_text(encoding="utf-8"), _PlainLoader)
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as YAML ({' '.join(str(error).split())})") from None
    if not isinstance(given, dict) or not isinstance(given.get(section), kind):
        raise InputError(f"{path}: wanted a mapping with a section {section}")
    return given


def build_config(settings: Mapping[str, Any], where: str) -> Config:
    """A complete Config from nested plain values. where: the file to name in an InputError."""
    return build(Config, settings, where)


def carried_settings(config: Config) -> dict[str, Any]:
    """The settings for a checkpoint, without those that depend on the machine."""
    settings: dict[str, Any] = plain(config)
    if config.autoencoder is not None:
        del settings["autoencoder"]["checkpoint_path"]
    return settings


def contradictions(carried: Mapping[str, Any], stated: Mapping[str, Any]) -> list[str]:
    """Keys with different values in both: ["model_params.depth (13 and 3)", ...]. None counts as missing."""
    return differences(_overlap(carried, stated), _overlap(stated, carried))


def _overlap(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """The part of `one` whose keys are in both."""
    return {
        key: _overlap(value, other[key]) if isinstance(value, Mapping) and isinstance(other[key], Mapping) else value
        for key, value in one.items()
        if value is not None and other.get(key) is not None
    }
