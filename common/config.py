"""What describes a network: its architecture, what it predicts, and the noise schedule it was made for.

One description serves the YAML files, the command line and the checkpoints. No torch in here, so
that reading options stays quick.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import types
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from common.errors import InputError
from common.files import check_regular

MODELS = ("uvit", "deediff_uvit")
PARAMETRIZATIONS = ("predict_noise", "predict_original", "predict_previous")
SOLVERS = ("ddpm", "ddim", "dpmsolver++", "unipc")
PRECISIONS = ("fp32", "bf16", "fp16")
PUBLIC_SCALE_FACTOR = 0.18215  # of the latents that the public U-ViT weights are of
MOST_YAML_BYTES = 2**20
# The largest value of each setting, wherever it is given.
MOST = {
    **{"img_size": 4096, "patch_size": 4096, "in_chans": 256, "embed_dim": 16384, "depth": 999, "num_heads": 1024},
    **{"mlp_ratio": 64, "num_classes": 1_000_000, "num_timesteps": 100_000},
}
BETA_SCHEDULES = ("linear", "scaled_linear", "continuous_vp")
CLASSIFIER_TYPES = (
    "attention_probe",
    "mlp_probe_per_layer",
    "mlp_probe_per_timestep",
    "mlp_probe_per_layer_per_timestep",
)


@dataclass(frozen=True, kw_only=True)
class UViTConfig:
    """One backbone. The fields are the keys of `model_params` in the YAML files and the arguments of UViT."""

    img_size: int  # side of the input, in pixels (latent cells with an autoencoder)
    patch_size: int  # side of a patch, same unit
    in_chans: int = 3
    embed_dim: int = 512
    depth: int = 13  # depth // 2 blocks in, one middle, depth // 2 out: 12 and 13 are the same network
    num_heads: int = 8
    mlp_ratio: float = 4
    qkv_bias: bool = False
    mlp_time_embed: bool = False
    num_classes: int = -1  # -1: unconditional
    normalize_timesteps: bool = False  # divide t by 1000 before embedding it
    conv: bool = True  # a final 3 x 3 convolution; the public huge weights have none

    def __post_init__(self) -> None:
        _check_transformer(self, side="img_size", channels="in_chans", width="embed_dim", of_width=2)

    @property
    def num_blocks(self) -> int:
        return self.depth // 2 * 2 + 1

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.in_chans, self.img_size, self.img_size


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """One DiT or SiT backbone. The fields are the arguments of DiT; the defaults are those of DiT-XL/2 at 256."""

    input_size: int = 32  # side of the input, in pixels (latent cells with an autoencoder)
    patch_size: int = 2  # side of a patch, same unit
    in_channels: int = 4
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4
    class_dropout_prob: float = 0.1  # more than 0: there is one more class, num_classes, that stands for none
    num_classes: int = 1000  # without "no class"; -1: unconditional
    learn_sigma: bool = False  # the weights make a variance too, which is dropped; False takes weights of either kind

    def __post_init__(self) -> None:
        _check_transformer(self, side="input_size", channels="in_channels", width="hidden_size", of_width=4)
        if not 0 <= self.class_dropout_prob <= 1:
            raise InputError(f"class_dropout_prob={self.class_dropout_prob} is outside [0, 1]")

    @property
    def num_blocks(self) -> int:
        return self.depth

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.in_channels, self.input_size, self.input_size

    @property
    def no_class(self) -> int | None:
        """The class that stands for none, where the network has one."""
        return self.num_classes if self.num_classes > 0 and self.class_dropout_prob else None

    @property
    def num_labels(self) -> int:
        """The classes that y may be, "no class" among them; 0 for an unconditional network."""
        return max(0, self.num_classes) + (self.no_class is not None)


def _check_transformer(config: UViTConfig | DiTConfig, *, side: str, channels: str, width: str, of_width: int) -> None:
    """Raises InputError for values out of range. side, channels, width: the fields of these. of_width: divides it."""
    as_of_uvit = {side: "img_size", channels: "in_chans", width: "embed_dim"}
    for name in (side, "patch_size", channels, width, "depth", "num_heads"):
        most = MOST[as_of_uvit.get(name, name)]
        if not 1 <= getattr(config, name) <= most:
            raise InputError(f"{name}={getattr(config, name)} is outside 1..{most}")
    if getattr(config, side) % config.patch_size:
        raise InputError(f"{side}={getattr(config, side)} is no multiple of patch_size={config.patch_size}")
    if getattr(config, width) % config.num_heads or getattr(config, width) % of_width:
        raise InputError(
            f"{width}={getattr(config, width)} must be a multiple of {of_width} and of num_heads={config.num_heads}"
        )
    if not 0 < config.mlp_ratio <= MOST["mlp_ratio"]:
        raise InputError(f"mlp_ratio={config.mlp_ratio} is outside (0, {MOST['mlp_ratio']}]")
    if config.num_classes != -1 and not 1 <= config.num_classes <= MOST["num_classes"]:
        raise InputError(f"num_classes={config.num_classes}: give -1 (unconditional) or 1..{MOST['num_classes']}")


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """The noise schedule, and how a network is told where on it an image is: the keys of `diffusion_params`.

    beta_schedule: betas linear, or linear in their square root (scaled_linear), from beta_start to beta_end; or those
    between T points of the continuous VP process (continuous_vp), whose beta rises from T beta_start to T beta_end in
    time 0..1.

    The network's time input is time_scale * (t + time_shift), see `diffusion.time_input`. The public U-ViT weights
    expect 0.999 (t + 1), which is 999 times the continuous time, or t + 1.
    """

    num_timesteps: int = 1000
    beta_schedule: str = "linear"
    beta_start: float = 1e-4
    beta_end: float = 0.02
    time_scale: float = 1.0
    time_shift: float = 0.0

    def __post_init__(self) -> None:
        check_choice("beta_schedule", self.beta_schedule, BETA_SCHEDULES)
        if not 1 <= self.num_timesteps <= MOST["num_timesteps"]:
            raise InputError(f"num_timesteps={self.num_timesteps} is outside 1..{MOST['num_timesteps']}")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise InputError(f"beta_start={self.beta_start}, beta_end={self.beta_end}: wanted 0 < start <= end < 1")
        if not 0 < self.time_scale <= 1000 or abs(self.time_shift) > 1000:
            raise InputError(
                f"time_scale={self.time_scale}, time_shift={self.time_shift}: wanted (0, 1000] and -1000..1000"
            )

    @property
    def schedule(self) -> dict[str, Any]:
        """The arguments of NoiseSchedule; what several networks on one image must share."""
        names = ("num_timesteps", "beta_schedule", "beta_start", "beta_end")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """The autoencoder between the network's latents and images: the keys of `autoencoder`."""

    # Latents are multiplied by it, so that their standard deviation is about 1. If not said: that of packed
    # latents in training, and of the public autoencoder in sampling.
    scale_factor: float | None = None
    checkpoint_path: str | None = None  # not carried by checkpoints: it is another on every machine

    @property
    def scale(self) -> float:
        return self.scale_factor or PUBLIC_SCALE_FACTOR

    def __post_init__(self) -> None:
        if self.scale_factor is not None and not 0 < self.scale_factor <= 1000:
            raise InputError(f"scale_factor={self.scale_factor} is outside (0, 1000]")


@dataclass(frozen=True, kw_only=True)
class Config:
    """A network as the YAML files and the checkpoints describe it."""

    model: str = "uvit"
    model_params: UViTConfig
    classifier_type: str | None = None  # of a deediff_uvit
    parametrization: str = "predict_noise"
    diffusion_params: DiffusionConfig = field(default_factory=DiffusionConfig)
    autoencoder: AutoencoderConfig | None = None  # None: the network makes pixels
    dataset: str | None = None  # what a checkpoint was trained on
    crop: str | None = None  # how its images were made square, see data.transforms
    real_classes: int | None = None  # of num_classes; all if not said. One more class is "no class"
    t_min: int | None = None  # the timesteps it was trained on are t_min..t_max; all if not said
    t_max: int | None = None

    def __post_init__(self) -> None:
        check_choice("model", self.model, MODELS)
        check_choice("parametrization", self.parametrization, PARAMETRIZATIONS)
        if self.model == "deediff_uvit":
            check_choice("classifier_type", self.classifier_type, CLASSIFIER_TYPES)
        elif self.classifier_type is not None:
            raise InputError(f"classifier_type={self.classifier_type} needs model deediff_uvit, not uvit")
        if self.real_classes is not None and not 1 <= self.real_classes <= self.model_params.num_classes:
            raise InputError(f"real_classes={self.real_classes}: wanted 1..num_classes={self.model_params.num_classes}")
        t_min, t_max = _range_of(self.t_min, self.t_max, self.diffusion_params.num_timesteps)
        if not 0 <= t_min <= t_max < self.diffusion_params.num_timesteps:
            last = self.diffusion_params.num_timesteps - 1
            raise InputError(f"t_min={t_min}, t_max={t_max}: wanted 0 <= t_min <= t_max <= {last}")

    @property
    def classes(self) -> range:
        """The classes there are images of; empty for an unconditional network."""
        return range(max(0, self.real_classes or self.model_params.num_classes))

    @property
    def trained_timesteps(self) -> range:
        """What training draws from; elsewhere the network is a stranger."""
        t_min, t_max = _range_of(self.t_min, self.t_max, self.diffusion_params.num_timesteps)
        return range(t_min, t_max + 1)

    @property
    def no_class(self) -> int | None:
        """The class that stands for none, where the network has one."""
        return len(self.classes) if self.classes and len(self.classes) == self.model_params.num_classes - 1 else None

    @property
    def conventions(self) -> str:
        """For people: the noise schedule, and what the network is told of t."""
        diffusion, normalize = self.diffusion_params, self.model_params.normalize_timesteps
        scale, shift = diffusion.time_scale, diffusion.time_shift
        told = f"t {'-' if shift < 0 else '+'} {abs(shift):g}" if shift else "t"
        if shift and (scale != 1 or normalize):
            told = f"({told})"
        told = f"{'' if scale == 1 else f'{scale:g} '}{told}{' / 1000' if normalize else ''}"
        betas = f"{diffusion.beta_schedule} betas {diffusion.beta_start:g}..{diffusion.beta_end:g}"
        return f"{betas}, time input {told} for t = 0..{diffusion.num_timesteps - 1}"


def _range_of(t_min: int | None, t_max: int | None, num_timesteps: int) -> tuple[int, int]:
    return t_min or 0, num_timesteps - 1 if t_max is None else t_max


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"{name}={value}: choose one of {', '.join(choices)}")


# What YAML 1.1 takes for a number and means another one by than most who write it: 1:30 is 90 there, and 010 is 8.
AMBIGUOUS_NUMBER = re.compile(r".*:.*|[-+]?0[\d_]+")


class _PlainLoader(yaml.SafeLoader):
    """Plain values, each written out: aliases of aliases of aliases could fill the memory from a few lines.

    A key that is given twice is an error, and numbers that YAML 1.1 reads in an unexpected way are text.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "aliases (*) are not taken", self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        keys = [key for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
        for key in (key for key in keys if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                problem = f"the key {shown(key.value)} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.Node) -> int | str:
        text = self.construct_scalar(node)
        return text if AMBIGUOUS_NUMBER.fullmatch(text) else super().construct_yaml_int(node)

    def construct_yaml_float(self, node: yaml.Node) -> float | str:
        text = self.construct_scalar(node)
        return text if AMBIGUOUS_NUMBER.fullmatch(text) else super().construct_yaml_float(node)


_PlainLoader.add_constructor("tag:yaml.org,2002:int", _PlainLoader.construct_yaml_int)
_PlainLoader.add_constructor("tag:yaml.org,2002:float", _PlainLoader.construct_yaml_float)

# Where the original authors' files have a setting, and its place here.
ORIGINAL_PLACES = {
    ("model_params", "classifier_type"): (None, "classifier_type"),
    ("autoencoder", "autoencoder_checkpoint_path"): ("autoencoder", "checkpoint_path"),
}


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings a YAML file gives, as nested dicts; sections and keys are checked, defaults not filled in.

    The original authors' files are read too. Raises InputError for a file that is no YAML mapping, a key nobody reads
    or a value of the wrong type.
    """
    given = read_mapping(path, "model_params", dict)
    for (section, key), (own_section, own_key) in ORIGINAL_PLACES.items():
        if isinstance(given.get(section), dict) and key in given[section]:
            value = given[section].pop(key)
            own = given if own_section is None else given[own_section]
            if own.get(own_key) is None:
                own[own_key] = value
            elif value not in (None, own[own_key]):
                raise InputError(
                    f"{path}: {section}.{key} {shown(value)} contradicts {own_key} {shown(own[own_key])}; leave one out"
                )
    return check_types(Config, given, str(path))


def read_mapping(path: Path, section: str, kind: type) -> dict[Any, Any]:
    """The mapping in a YAML file of plain values, of which only one section's kind is checked.

    Raises InputError for a file that is none.
    """
    check_regular(path)
    try:
        if (size := path.stat().st_size) > MOST_YAML_BYTES:
            raise InputError(f"{path}: {size:,} bytes, at most {MOST_YAML_BYTES:,} are taken")
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
    """A complete Config from nested settings; what they leave out takes its default.

    where: named in the InputError where something required is missing, or a value does not do.
    """
    return build(Config, settings, where)


def settings_of(config: Any) -> dict[str, Any]:
    """The nested plain values that `build_config` takes back."""
    return dataclasses.asdict(config)


def carried_settings(config: Config) -> dict[str, Any]:
    """The settings that go into a checkpoint: those that are the same on every machine."""
    settings = settings_of(config)
    if config.autoencoder is not None:
        settings["autoencoder"]["checkpoint_path"] = None
    # A setting that came later is left out where it changes nothing: checkpoints made before it compare equal.
    if settings["model_params"].get("conv"):
        del settings["model_params"]["conv"]
    trained, last = config.trained_timesteps, config.diffusion_params.num_timesteps - 1
    return settings | {"t_min": trained[0] or None, "t_max": None if trained[-1] == last else trained[-1]}


def completed(carried: Mapping[str, Any]) -> dict[str, Any]:
    """Carried settings with t_min, t_max and conv: a network that leaves them out was trained on every timestep, and
    has a final convolution.
    """
    num_timesteps = (carried.get("diffusion_params") or {}).get("num_timesteps") or DiffusionConfig.num_timesteps
    t_min, t_max = _range_of(carried.get("t_min"), carried.get("t_max"), num_timesteps)
    model_params = {"conv": UViTConfig.conv, **(carried.get("model_params") or {})}
    return {**carried, "model_params": model_params, "t_min": t_min, "t_max": t_max}


def merge(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings of which `upper` wins; None there means not given."""
    merged = dict(lower)
    for key, value in upper.items():
        if isinstance(value, Mapping):
            merged[key] = merge(merged.get(key) or {}, value)
        elif value is not None:
            merged[key] = value
    return merged


def contradictions(
    carried: Mapping[str, Any], given: Mapping[str, Any], prefix: str = "", *, none_counts: bool = False
) -> list[str]:
    """The keys that both state, with different values: ["depth (13 and 3)", ...], in the order of `given`.

    none_counts: None is a value like others, and does not mean that a key is not stated.
    """
    found = []
    for key in (key for key in given if key in carried):
        before, now = carried[key], given[key]
        if not none_counts and (before is None or now is None):
            continue
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            found += contradictions(before, now, f"{prefix}{key}.", none_counts=none_counts)
        elif key == "depth" and isinstance(before, int) and isinstance(now, int):
            if before // 2 != now // 2:  # 12 and 13 are the same network
                found.append(f"{prefix}{key} ({before} and {now})")
        elif before != now:
            found.append(f"{prefix}{key} ({in_words(before)} and {in_words(now)})")
    return found


T = TypeVar("T")
KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", Path: "a path", list: "a list"}
EXPONENT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d{1,2}")


def check_types(cls: type, given: Mapping[Any, Any], where: str) -> dict[str, Any]:
    """`given`, with every key known to the dataclass `cls` and every value of its type, all the way down."""
    hints = get_type_hints(cls)
    known = {f.name for f in fields(cls)}
    if unknown := sorted(shown(key).strip("'") for key in given if key not in known):
        raise InputError(f"{where}: unknown key {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    return {key: _check_type(value, hints[key], f"{where}: {key}") for key, value in given.items()}


def shown(value: object) -> str:
    """A value for a message: not long, however large or nested it is."""
    if isinstance(value, str):
        return f"{value!r:.80}"
    if isinstance(value, int) and value.bit_length() > 256:
        return "a huge number"
    if value is None:
        return "none"
    if isinstance(value, int | float):
        return f"{value!r:.80}"
    return "a mapping" if isinstance(value, Mapping) else f"a {type(value).__name__}"


def in_words(value: object) -> str:
    """A setting's value for a message, without the marks of Python's lists, mappings and texts; not long."""

    def bare(item: object) -> str:
        return item[:80] if isinstance(item, str) else shown(item)

    if isinstance(value, Mapping):
        value = [f"{key} {bare(item)}" for key, item in itertools.islice(value.items(), 8)]
    text = ", ".join(map(bare, value[:8])) if isinstance(value, list | tuple) else bare(value)
    return text[:80] or "empty"


def _check_type(value: Any, wanted: Any, where: str) -> Any:
    options = get_args(wanted) if get_origin(wanted) in (Union, types.UnionType) else (wanted,)
    for option in options:
        if dataclasses.is_dataclass(option) and isinstance(value, Mapping):
            return check_types(option, value, where)
        if get_origin(option) is list and isinstance(value, list):
            return [_check_type(item, get_args(option)[0], f"{where} {n}") for n, item in enumerate(value, 1)]
        if option is Path and isinstance(value, str | Path):
            return Path(value)
        if option is float and type(value) in (int, float) and abs(value) < 1e300:
            return float(value)
        if type(value) is option and not (option is int and abs(value) >= 2**63):
            return value
        if option is float and isinstance(value, str) and EXPONENT.fullmatch(value):
            return float(value)  # YAML takes 1.0e-4 for a number, and 1e-4 for text
    names = " or ".join(KINDS.get(get_origin(o) or o, "a mapping") for o in options if o is not type(None))
    raise InputError(f"{where} is {shown(value)}, wanted {names}")


def build(cls: type[T], settings: Mapping[str, Any], where: str) -> T:
    """An instance of the dataclass `cls`, and of those in it, from nested settings; None there means not given.

    where: begins the message of the InputError for a key nobody reads, a value of the wrong type or out of range.
    """
    settings = check_types(cls, {key: value for key, value in settings.items() if value is not None}, where)
    hints = get_type_hints(cls)
    for name, value in settings.items():
        for section in filter(dataclasses.is_dataclass, (hints[name], *get_args(hints[name]))):
            if isinstance(value, Mapping):
                settings[name] = build(section, value, f"{where}: {name}")
            elif isinstance(value, list):
                settings[name] = [build(section, item, f"{where}: {name} {n}") for n, item in enumerate(value, 1)]
    required = [f.name for f in fields(cls) if f.default is f.default_factory is dataclasses.MISSING]
    if missing := [name for name in required if name not in settings]:
        raise InputError(f"{where}: {', '.join(missing)} not given")
    try:
        return cls(**settings)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
