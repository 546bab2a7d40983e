"""benchmark.py, on tiny networks: what it prints and writes, and that its figures fit each other."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import benchmark
from models import UViT, loading
from models.flops import backbone_flops
from models.loading import load_network
from tests.conftest import TINY

QUICK = ["--device", "cpu", "--rounds", "2", "--batch_size", "6"]


@pytest.fixture(autouse=True)
def _short_turns(monkeypatch):
    monkeypatch.setattr("common.timing.LEAST_SECONDS", 0.0)


@pytest.fixture
def config(tmp_path):
    def write(**settings):
        path = tmp_path / f"{len(list(tmp_path.glob('*.yaml')))}.yaml"
        path.write_text(yaml.safe_dump({"model_params": TINY | settings.pop("model_params", {})} | settings))
        return path

    return write


def read(folder, name):
    result = json.loads((folder / f"{name}.json").read_text())
    assert result["machine"]["device"] == "cpu" and result["machine"]["threads"] == torch.get_num_threads()
    assert (folder / "benchmark.png").exists() or name == "train"
    return result["measured"]


@pytest.mark.slow
def test_sampling(full, shallow, tmp_path, run_quietly):
    """On checkpoints, in two precisions."""
    flags = ["sample", *QUICK, "--full", full, "--shallow", shallow, "--steps", 4, "--t_switch", 3, 19, -1]
    said = run_quietly(benchmark.main, [*flags, "--precision", "fp32", "bf16", "--output_folder", tmp_path / "b"])
    assert "speed-up" in said and "dpmsolver++" in said and "fp32, batch 6" in said and "bf16, batch 6" in said
    measured = read(tmp_path / "b", "sample")
    assert [m["precision"] for m in measured] == ["fp32", "bf16"]
    flops = {
        name: backbone_flops(load_network(path, {}, UViT).module)
        for name, path in (("full", full), ("shallow", shallow))
    }
    for result in measured:
        assert {n["network"]: n["flops_per_image_call"] for n in result["networks"]} == flops
        assert all(n["share_of_matrix_rate"] > 0 for n in result["networks"])
        runs = {(r["solver"], r["t_switch"]): r for r in result["runs"]}
        assert len(runs) == 8
        steps = {t_switch: runs["ddpm", t_switch]["steps"] for t_switch in (None, 3, 19, -1)}  # t = 19, 14, 9, 4
        assert steps[None] == {"full": 4} and steps[19] == {"shallow": 0, "full": 4}
        assert steps[3] == steps[-1] == {"shallow": 4, "full": 0}
        assert runs["ddpm", 19]["speed_up_predicted"] == 1
        assert runs["ddpm", -1]["speed_up_predicted"] == pytest.approx(flops["full"] / flops["shallow"])
        for run in runs.values():
            assert 0 < run["images_per_second"] < run["images_per_second_network_only"]
            assert 0 < run["share_outside_network"] < 1
            assert run["speed_up_reached"] == pytest.approx(run["speed_up"] / run["speed_up_predicted"])


@pytest.mark.slow
def test_files_are_read_once(full, shallow, tmp_path, run_quietly, monkeypatch):
    """Also for several precisions; and a copy that was trained, or rounded, is not the next one's network."""
    read, reading = [], loading.read_weights

    def counting(path, weights="ema"):
        read.append(path)
        return reading(path, weights)

    monkeypatch.setattr(loading, "read_weights", counting)
    out = ["--precision", "bf16", "fp32", "--output_folder", tmp_path / "b"]
    flags = ["sample", *QUICK, *out, "--full", full, "--shallow", shallow, "--steps", 2, "--t_switch", 9]
    run_quietly(benchmark.main, flags)
    assert sorted(read) == sorted([full, shallow])
    run_quietly(benchmark.main, ["train", *QUICK, *out, "--model", full])
    assert len(read) == 3
    network = benchmark.open_network(full, UViT)
    benchmark.copy_of(network, torch.device("cpu")).module.bfloat16()
    assert network.module.pos_embed.dtype == torch.float32


def test_flags_describe_a_network(config, full, tmp_path, fails):
    """That of --model, or --full: random weights, and weights that came without a description."""
    content = torch.load(full, weights_only=True)
    torch.save(content["model"], tmp_path / "bare.pth")
    yaml_file = config(model_params={"depth": 9})
    for script, option in (("train", "--model"), ("sample", "--full")):
        for path, more in ((yaml_file, []), (tmp_path / "bare.pth", ["--config_path", yaml_file])):
            argv = [script, option, path, *more, "--depth", 5, "--num_timesteps", 30]
            _, settings = benchmark.parse_settings([str(word) for word in argv])
            network = benchmark.open_network(path, UViT, settings)
            assert len(network.module.in_blocks) == 2
            assert network.config.diffusion_params.num_timesteps == 30
    fails(benchmark.main, ["train", "--model", tmp_path / "bare.pth"], "bare.pth", "--config_path")
    fails(benchmark.main, ["train", "--model", yaml_file, "--config_path", yaml_file], "give one of them")


@pytest.mark.parametrize("classifier_type", ["mlp_probe_per_layer", "attention_probe", "mlp_probe_per_timestep"])
def test_early_exit(classifier_type, config, tmp_path, run_quietly):
    model = config(classifier_type=classifier_type, model_params={"depth": 5})
    flags = ["early-exit", *QUICK, "--model", model, "--min_group", 1, 3, "--output_folder", tmp_path / "b"]
    said = run_quietly(benchmark.main, flags)
    assert "spread, min_group 3" in said and classifier_type in said
    (result,) = read(tmp_path / "b", "early-exit")
    assert [e["exit_layer"] for e in result["exits"]] == [e["mean_exit_layer"] for e in result["exits"]]
    assert [e["exit_layer"] for e in result["exits"]] == list(range(6))
    assert [s["mean_exit_layer"] for s in result["spread"]] == [2.5, 2.5], "six images, at depths 0..5"
    ideal = [e["seconds_per_image_ideal"] for e in result["exits"]]
    assert ideal[5] > ideal[0] > 0


def test_training(config, early_exit, tmp_path, run_quietly):
    backbone = config(model_params={"depth": 3, "num_classes": 3})
    for model, more, factor in ((backbone, [], 3), (early_exit, ["--freeze_backbone"], None), (early_exit, [], None)):
        run_quietly(benchmark.main, ["train", *QUICK, "--model", model, *more, "--output_folder", tmp_path / "b"])
        (result,) = read(tmp_path / "b", "train")
        assert result["frozen_backbone"] == bool(more)
        assert result["images_per_second"] == pytest.approx(6 * result["steps_per_second"])
        if factor:
            network = benchmark.open_network(model, UViT).module
            assert result["flops_per_image"] == factor * backbone_flops(network)
    assert not (tmp_path / "b" / "benchmark.png").exists(), "training has no part in the picture"


def test_the_picture_has_what_the_folder_has(config, tmp_path, run_quietly):
    tiny, folder = config(model_params={"depth": 1}), tmp_path / "b"
    width = []
    for flags in (["sample", "--full", tiny, "--shallow", tiny, "--steps", 2], ["early-exit", "--model", None]):
        if flags[0] == "early-exit":
            flags[-1] = config(classifier_type="mlp_probe_per_layer", model_params={"depth": 1})
        run_quietly(benchmark.main, [*flags, *QUICK, "--output_folder", folder])
        width.append(np.array(Image.open(folder / "benchmark.png")).shape[1])
    assert width[1] == 2 * width[0]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], ["required"]),
        (["sampling"], ["invalid choice"]),
        (["sample", "--t_switch", "1000"], ["--t_switch 1000"]),
        (["sample", "--steps", "1001"], ["--steps 1001"]),
        (["sample", "--full", "EE"], ["wanted a uvit"]),
        (["sample", "--shallow", "OTHER"], ["cannot run on one image"]),
        (["sample", "--full", "PREVIOUS", "--shallow", "PREVIOUS", "--solver", "unipc"], ["predict_previous"]),
        (["sample", "--precision", "fp16"], ["--precision fp16"]),
        (["early-exit", "--model", "OTHER"], ["wanted a deediff_uvit"]),
        (["train", "--model", "OTHER", "--freeze_backbone"], ["--freeze_backbone"]),
        (["train", "--model", "MISSING"], ["no such file"]),
        (["train", "--rounds", "0"], ["--rounds"]),
    ],
)
def test_wrong_use_ends_in_one_line(flags, words, config, early_exit, tmp_path, fails, monkeypatch):
    monkeypatch.setattr("common.devices.in_hardware", lambda precision, device: precision == "fp32")
    files = {"EE": early_exit, "OTHER": config(), "MISSING": tmp_path / "none.yaml"}
    files["PREVIOUS"] = config(parametrization="predict_previous")
    fails(benchmark.main, [files.get(flag, flag) for flag in flags], *words)
