"""The README's commands, as they are written there, on tiny networks and a CelebA of eight images."""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
import string
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import benchmark
import calibrate
import compare
import eesampler
import fid
import main
import sampler
import train
from common.config import build_config, read_yaml
from data import pack
from models.loading import build_network

ROOT = Path(__file__).parents[1]
SCRIPTS = {module.__name__ + ".py": module for module in (train, main, sampler, eesampler, fid, compare, calibrate)}
SMALL = ["--embed_dim", "32", "--num_heads", "4"]
# What makes a command quick; options given twice count the last time.
QUICK = {
    "train.py": [
        "--n_steps",
        "2",
        "--batch_size",
        "2",
        "--depth",
        "5",
        "--preview_steps",
        "1",
        "--device",
        "cpu",
        *SMALL,
    ],
    "main.py": ["--n_steps", "2", "--batch_size", "2", "--preview_steps", "1", "--device", "cpu", "--quiet"],
    "sampler.py": ["--solver", "ddim", "--steps", "4", "--batch_size", "3", "--device", "cpu", "--quiet"],
    "eesampler.py": ["--solver", "ddim", "--steps", "4", "--batch_size", "3", "--device", "cpu", "--quiet"],
    "fid.py": ["--feature_extractor", "extractor.pt", "--cache_dir", "cache", "--device", "cpu", "--quiet"],
    "compare.py": [],
    "calibrate.py": ["--solver", "ddim", "--steps", "4", "--batch_size", "4", "--device", "cpu", "--quiet"],
}


def commands(benchmarks: bool = False) -> list[list[str]]:
    """Every `python X.py ...` of the README's bash blocks, but for `python benchmark.py`, or those alone."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    found = [shlex.split(line) for line in lines if line.startswith("python ")]
    return [words for words in found if (words[1] == "benchmark.py") == benchmarks]


class MeanColour(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean(dim=(2, 3))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder with tiny configs, a CelebA archive and a feature extractor."""
    (tmp_path / "configs").mkdir()
    for path in (ROOT / "configs").glob("*celeba*.yaml"):
        config = yaml.safe_load(path.read_text())
        config["model_params"] |= {"embed_dim": 32, "num_heads": 4, "depth": min(5, config["model_params"]["depth"])}
        (tmp_path / "configs" / path.name).write_text(yaml.safe_dump(config))
    (tmp_path / "datasets").mkdir()
    with zipfile.ZipFile(tmp_path / "datasets" / "img_align_celeba.zip", "w") as archive:
        for n in range(1, 9):
            pixels = np.random.default_rng(n).integers(0, 256, (218, 178, 3), dtype=np.uint8)
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "JPEG")
            archive.writestr(f"img_align_celeba/{n:06d}.jpg", file.getvalue())
    with torch.no_grad():
        traced = torch.jit.trace(MeanColour(), torch.zeros(2, 3, 64, 64, dtype=torch.uint8))
    traced.save(str(tmp_path / "extractor.pt"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_the_walk(place, capsys):
    assert [words[1] for words in commands()] == [
        *("train.py", "main.py", "main.py", "sampler.py", "eesampler.py", "fid.py", "compare.py"),
        *("-m", "-m", "sampler.py", "main.py", "sampler.py", "calibrate.py", "sampler.py", "main.py", "train.py"),
        *("sampler.py", "sampler.py"),
    ]
    walk = commands()[:7]
    values = {
        "log_path": "logs",
        "load_backbone": "logs/celeba_uvit_5/celeba_uvit_last.pth",
        "full_model_path": "logs/celeba_uvit_5/celeba_uvit_last.pth",
        "shallow_model_path": "logs/celeba_uvit_3/celeba_uvit_last.pth",
        "checkpoint_path": "logs/celeba_deediff_uvit_5/celeba_deediff_uvit_last.pth",
        "seed": "1",
        "samples_path": "duo",
        "full_samples": "duo",
        "duodiff_samples": "duo",
        "early_exit_samples": "duo",
    }
    for _, script, *words in walk:
        values["output_folder"] = {"sampler.py": "duo", "eesampler.py": "ee"}.get(script, "")
        argv = [string.Template(word).substitute(values) for word in words]
        SCRIPTS[script].main([*argv, *QUICK[script]])
    said = capsys.readouterr().out
    assert "shallow ran 3 timesteps, full ran 1 timesteps" in said  # 999, 749, 499; 249
    assert "speed-up" in said
    for path in ("duo/000002.png", "duo/report/metrics.json", "ee/report/exit_layer.png", "comparison.png"):
        assert (place / path).exists(), path


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_from_the_public_weights_to_duodiff(place, capsys):
    """A tiny network in the public layout stands for the public file; CelebA is packed on the way."""
    _, pack_latents, *walk = commands()[7:12]
    packing = commands()[7]
    assert packing[1:3] == pack_latents[1:3] == ["-m", "data.pack"]
    pack.main([*packing[3:], "--num_workers", "0"])
    settings = read_yaml(place / "configs" / "uvit_celeba_public.yaml") | {"model": "uvit"}
    (place / "checkpoints").mkdir()
    weights = build_network(build_config(settings, "public")).state_dict()
    torch.save(weights, place / "checkpoints" / "celeba_uvit_small.pth")
    for number, (_, script, *words) in enumerate(walk):
        values = {"log_path": "logs", "output_folder": f"out{number}"}
        argv = [string.Template(word).substitute(values) for word in words]
        SCRIPTS[script].main([*argv, *QUICK[script]])
    assert "shallow ran 2 timesteps, full ran 2 timesteps" in capsys.readouterr().out  # 999, 749; 499, 249
    carried = torch.load(place / "logs" / "shallow_public" / "celeba_uvit_last.pth", weights_only=True)["config"]
    assert carried["crop"] == "uvit128" and carried["diffusion_params"]["beta_schedule"] == "continuous_vp"


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_where_to_switch(place, capsys):
    values = {"log_path": "logs", "output_folder": "out", "seed": "1"}
    values |= {f"{name}_model_path": f"logs/{name}/celeba_uvit_last.pth" for name in ("shallow", "full")}
    flags = [*commands()[0][2:], *QUICK["train.py"], "--log_path", "logs", "--preview_steps", "0"]
    for name, depth in (("shallow", "3"), ("full", "5")):
        train.main([*flags, "--depth", depth, "--exp_name", name])
    for _, script, *words in commands()[12:14]:
        argv = [string.Template(word).substitute(values) for word in words]
        SCRIPTS[script].main([*argv, *QUICK[script], "--n_images", "8", "--speedup", "1"])
    assert capsys.readouterr().out.count("chosen: t_switch") == 2
    assert (place / "logs" / "calibration.yaml").exists() and (place / "out" / "report" / "calibration.png").exists()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_networks_for_their_part(place):
    values = {"log_path": "logs", "full_model_path": "logs/celeba_uvit_5/celeba_uvit_last.pth"}
    train.main([*commands()[0][2:], *QUICK["train.py"], "--log_path", "logs", "--preview_steps", "0"])
    for _, script, *words in commands()[14:16]:
        argv = [string.Template(word).substitute(values) for word in words]
        SCRIPTS[script].main([*argv, *QUICK[script], *SMALL, "--n_steps", "3"])
    carried = [torch.load(path, weights_only=True)["config"] for path in sorted(place.glob("logs/*_[45]*/*.pth"))]
    assert [(config["t_min"], config["t_max"]) for config in carried] == [(None, None), (None, 499), (500, None)]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_cascades_and_caching(place, capsys):
    """The example of a schedule, with one network's weights under each of its names."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (schedule,) = re.findall(r"```yaml\n# cascade.yaml(.*?)```", text, re.DOTALL)
    (place / "cascade.yaml").write_text("#" + schedule)
    train.main([*commands()[0][2:], *QUICK["train.py"], "--log_path", "trained", "--preview_steps", "0"])
    for path in re.findall(r"checkpoint_path: (.*)", schedule):
        (place / path).parent.mkdir(parents=True)
        shutil.copy(place / "trained" / "celeba_uvit_5" / "celeba_uvit_last.pth", place / path)
    for number, (_, script, *words) in enumerate(commands()[16:]):
        values = {"full_model_path": "logs/celeba_uvit_13/celeba_uvit_last.pth", "output_folder": f"out{number}"}
        argv = [string.Template(word).substitute(values) for word in words]
        SCRIPTS[script].main([*argv, *QUICK[script]])
    said = capsys.readouterr().out
    assert "network 1 ran 2 timesteps, network 2 ran 1 timesteps, network 3 ran 1 timesteps" in said
    backbone = json.loads((place / "out1" / "report" / "statistics.json").read_text())["backbones"][0]
    assert backbone["timesteps_reusing"] == 2  # of 999, 749, 499, 249 the middle two


def test_benchmarks():
    """Of the networks that they take if none are named; tests/test_benchmark.py runs them on small ones."""
    options = [benchmark.parse_args(words[2:]) for words in commands(benchmarks=True)]
    assert [args.command for args in options] == ["sample", "early-exit", "train"]
    assert all(
        path.is_file() for args in options for path in vars(args).values() if getattr(path, "suffix", "") == ".yaml"
    )


OF_THE_PAPER = sorted(path for path in (ROOT / "configs").glob("*.yaml") if not path.stem.endswith("_public"))


@pytest.mark.parametrize("path", OF_THE_PAPER, ids=lambda path: path.stem)
def test_configs_describe_networks(path):
    """Those of public weights: tests/test_public_weights.py."""
    settings = read_yaml(path)
    model = "deediff_uvit" if path.stem.startswith("deediff") else "uvit"
    config = build_config(settings | {"model": model}, str(path))
    params = config.model_params
    name, _, blocks = path.stem.partition("_")[2].partition("_")
    full = {"celeba": 13, "cifar10": 13, "imagenet64": 17, "imagenet256": 21, "digits": 7, "emoji16": 7}[name]
    assert params.num_blocks == int(blocks or full)
    assert (params.mlp_ratio, params.qkv_bias) == (4, False)
    if name not in ("digits", "emoji16"):
        width, heads = {"imagenet64": (768, 12), "imagenet256": (1024, 16)}.get(name, (512, 8))
        assert (params.embed_dim, params.num_heads, params.mlp_time_embed) == (width, heads, False)
        assert params.normalize_timesteps == (name in ("celeba", "cifar10"))
        assert params.num_classes == {"imagenet64": 1000, "imagenet256": 1001}.get(name, -1)
        shapes = {"celeba": (64, 4, 3), "cifar10": (32, 2, 3), "imagenet64": (64, 4, 3), "imagenet256": (32, 2, 4)}
        assert (params.img_size, params.patch_size, params.in_chans) == shapes[name]
