"""The weights of a checkpoint for samplers: python export.py IN OUT.safetensors, or python export.py IN DIR."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import Parser
from common.config import PRECISIONS, build_config, contradictions
from common.errors import InputError, command
from common.files import read_json, replacing, write_json
from common.settings import Checked, in_words, option

if TYPE_CHECKING:
    from models.weights import Weights

WEIGHTS = (".pth", ".pt", ".bin", ".ckpt")  # suffixes of files; a folder with such a name is probably a mistake
KINDS = {"ema": "averaged (EMA)", "raw": "of the last step"}
SCORES = ("fid", "kid", "kid_std", "is", "is_std", "precision", "recall")


@dataclass(frozen=True, kw_only=True)
class ExportSettings(Checked):
    """Settings of export.py."""

    source: Path = option(help="checkpoint to read", exists="file", positional=True, metavar="IN")
    target: Path = option(
        help="file to write, ending in .safetensors, or folder, which also gets a model card; replaces an older export",
        positional=True,
        metavar="OUT",
    )
    weights: str = option("ema", "ema for averaged weights, raw for those of the last step", choices=("ema", "raw"))
    precision: str | None = option(
        None,
        "round the weights to this precision: fp16 and bf16 halve the file (default: as they are)",
        choices=PRECISIONS,
    )
    scores: Path | None = option(
        None, "report/metrics.json of samples of this network, for the scores in the model card", exists="file"
    )


def parse_settings(argv: Sequence[str] | None) -> ExportSettings:
    description = (
        "Write the weights of a checkpoint, and the description of the network, as safetensors: a file, or a folder "
        "for sampler.py --checkpoint_path, with a model card."
    )
    return Parser(prog="export.py", description=description).settings(ExportSettings, argv, network=False)


@command
def main(argv: Sequence[str] | None = None) -> None:
    settings = parse_settings(argv)
    done = export(settings.source, settings.target, settings.weights, settings.scores, settings.precision)
    print(f"{done} -> {settings.target}")


def export(source: Path, target: Path, weights: str, scores: Path | None = None, precision: str | None = None) -> str:
    """Write the weights of a checkpoint, and the description, as safetensors, or as a folder with a model card.

    scores: metrics.json of samples of the network, for the card. precision: one of PRECISIONS, to which the weights are
    rounded; None leaves them. Returns a description of the written weights.
    """
    from common.devices import DTYPES
    from models.weights import IN_FOLDER, check_numbers, is_exported, read_weights

    in_folder = target.suffix != ".safetensors"
    file = target / IN_FOLDER if in_folder else target
    if in_folder and target.suffix in WEIGHTS and not target.is_dir():
        raise InputError(f"{target}: wanted a name that ends in .safetensors, or a folder")
    if scores and not in_folder:
        raise InputError(f"--scores is for the model card of a folder; {target} is a file")
    if not target.parent.is_dir():
        raise InputError(f"{target.parent}: no such folder")
    if file.exists() and file.samefile(source):
        raise InputError(f"{file} is the file to read; give another name for the export")
    if in_folder and target.exists() and not (target.is_dir() and (not any(target.iterdir()) or is_exported(target))):
        raise InputError(f"{target} exists already and is not from export.py; choose another name")
    read = read_weights(source, weights)
    description = read.settings
    if description is None:
        raise InputError(f"{source} has no description of its network; only checkpoints of this project have one")
    if read.kind != weights:
        raise InputError(f"{source} has only {read.kind} weights; give --weights {read.kind}")
    check_numbers(read.state_dict, source)
    if precision is not None:
        rounded = {name: value.to(DTYPES[precision]) for name, value in read.state_dict.items()}
        check_numbers(rounded, f"{source} rounded to {precision}")  # values too large for fp16 become infinite
        read = read._replace(state_dict=rounded)
    if in_folder:
        card = model_card(read, description, target, scores)
        target.mkdir(exist_ok=True)
        _write_folder(read, target, card)
    else:
        _write_file(read, file)
    return f"{read.kind} weights of step {read.step}"


def _write_file(read: Weights, file: Path) -> None:
    from safetensors.torch import save_file

    about = {"format": "pt", "config": json.dumps(read.settings), "weights": read.kind, "step": str(read.step)}
    with replacing(file) as temporary:
        save_file({name: value.contiguous() for name, value in read.state_dict.items()}, temporary, about)


def _write_folder(read: Weights, folder: Path, card: str) -> None:
    from models.weights import FORMAT, IN_FOLDER

    # Written first, so that the next export recognises and replaces an incomplete folder.
    write_json(
        folder / "config.json", {"format": FORMAT, "weights": read.kind, "step": read.step, "config": read.settings}
    )
    _write_file(read, folder / IN_FOLDER)
    with replacing(folder / "README.md") as temporary:
        temporary.write_text(card, encoding="utf-8")


def model_card(read: Weights, description: Mapping[str, Any], folder: Path, scores: Path | None) -> str:
    """README.md of a folder: the network, its training data, its scores, and the command that samples.

    description: of the network, see common.config. scores: metrics.json. Raises InputError for other scores.
    """
    from models.loading import sampler_of

    config = build_config(description, str(folder))
    params = config.model_params
    channels, side, _ = params.image_shape
    early_exit, sampler = config.model == "deediff_uvit", sampler_of(config.model)
    classes = f"{len(config.classes)}" if config.classes else "none"
    rows = [
        ("network", f"{config.model}, {params.num_blocks} blocks"),
        ("parameters", f"{sum(value.numel() for value in read.state_dict.values()) / 1e6:.2f} M"),
        ("makes", f"{'latents' if config.autoencoder else 'images'} of {channels} x {side} x {side}"),
        ("classes", classes + (f", and class {config.no_class} for none" if config.no_class is not None else "")),
        ("data", in_words(config.dataset or "unknown") + (f", crop {in_words(config.crop)}" if config.crop else "")),
        ("steps", f"{read.step}"),
        ("weights", f"{KINDS[read.kind]}, in {precisions_of(read)}"),
        ("predicts", config.parametrization.removeprefix("predict_")),
        ("noise schedule", config.conventions),
        ("timesteps", f"{config.t_min}..{config.t_max} of {config.diffusion_params.num_timesteps}"),
    ]
    words = [
        *("python", sampler, "--checkpoint_path", folder.as_posix()),
        *(("--threshold", "0.1") if early_exit else ()),
        *(("--autoencoder_checkpoint_path", "AUTOENCODER") if config.autoencoder else ()),
        *("--n_samples", "16", "--output_folder", "out/samples"),
    ]
    parts = [
        f"# {folder.resolve().name}\n\nA diffusion model of DuoDiff.",
        _markdown(("", ""), rows),
    ]
    if scores:
        own = {**description, "step": read.step, "weights": read.kind}
        parts.append(f"## Scores\n\n{_scores(own, scores)}")
    parts.append(f"## Sampling\n\n```\n{shlex.join(words)}\n```")
    return "\n\n".join(parts) + "\n"


def precisions_of(read: Weights) -> str:
    """The precision of the weights, by the name of their torch type."""
    return ", ".join(sorted({str(value.dtype).removeprefix("torch.") for value in read.state_dict.values()}))


def _scores(own: Mapping[str, Any], path: Path) -> str:
    """The scores as a table, with the settings that they depend on.

    own: the network's description, step and kind of weights. Raises InputError for scores of other networks.
    """
    content = read_json(path)
    run = _mapping_in(content, "run")
    backbones = run.get("backbones")
    if not isinstance(backbones, list) or not any(name in content for name in SCORES):
        raise InputError(f"--scores {path}: wanted the report/metrics.json that fid.py wrote of samples")
    found = [contradictions(own, backbone) for backbone in backbones if isinstance(backbone, Mapping)]
    if [] not in found:
        differ = ", ".join(found[0]) if found else "all"
        raise InputError(f"--scores {path} is of samples of another network, which differs in {differ}")
    settings = _mapping_in(run, "settings")
    rows = [(name, f"{content[name]:.4g}") for name in SCORES if isinstance(content.get(name), int | float)]
    rows += [("samples", in_words(content.get("n_samples")))]
    rows += [(name.replace("_", " "), _all_of(content.get(name))) for name in ("reference", "feature_extractor")]
    rows += [(name, in_words(settings[name])) for name in ("seed", "solver", "steps") if name in settings]
    rows += [("networks that shared the sampling", str(len(backbones)))] * (len(backbones) > 1)
    return _markdown(("", ""), rows)


def _mapping_in(content: object, key: str) -> dict[str, Any]:
    """The mapping under a key; empty if it is missing."""
    value = content.get(key) if isinstance(content, dict) else None
    return value if isinstance(value, dict) else {}


def _all_of(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {in_words(item)}" for key, item in value.items())
    return in_words(value)


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(' '.join(cell.replace('|', '/').split()) for cell in line)} |" for line in lines)
