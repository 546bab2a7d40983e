"""YAML files: what is read, and what is refused with the file's name."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path

import pytest

from common.config import Config, UViTConfig, build_config, carried_settings, contradictions, read_yaml
from common.errors import InputError
from common.settings import build, check_types, differences, in_words
from generation.stages import StageFile

CONFIGS = Path(__file__).parents[2] / "configs"
LEAST = "model_params:\n  img_size: 8\n  patch_size: 4\n"


@pytest.fixture
def read(tmp_path):
    def call(text: str) -> Config:
        path = tmp_path / "net.yaml"
        path.write_text(text, encoding="utf-8")
        return build_config(read_yaml(path), str(path))

    return call


@pytest.mark.parametrize(
    "text, key",
    [
        (LEAST + "  depth: 3\n  depth: 5\n", "depth"),
        (LEAST + "parametrization: predict_noise\nparametrization: predict_original\n", "parametrization"),
        (LEAST + "  'depth': 3\n  depth: 3\n", "depth"),
        (LEAST + LEAST, "model_params"),
    ],
)
def test_a_key_that_is_given_twice(read, text, key):
    with pytest.raises(InputError, match=rf"net\.yaml: .*the key '{key}' is given twice.*line \d"):
        read(text)


@pytest.mark.parametrize("text", ["1:30", "+1:30", "013", "0_7", "!!int 1:30", "1:30.5", "0x1f:00"])
def test_numbers_that_yaml_takes_for_others(read, text):
    """1:30 is 90 to YAML 1.1, in base 60, and 013 is 11, in base 8."""
    with pytest.raises(InputError, match=r"net\.yaml: model_params: depth is '.*', wanted"):
        read(f"{LEAST}  depth: {text}\n")


@pytest.mark.parametrize("text", ["1:30.5", "0:0.5", "1:30"])
def test_fractions_that_yaml_takes_for_others(read, text):
    with pytest.raises(InputError, match=r"net\.yaml: model_params: mlp_ratio is '.*', wanted"):
        read(f"{LEAST}  mlp_ratio: {text}\n")


@pytest.mark.parametrize(
    "text, value", [("13", 13), ("+13", 13), ("0x0d", 13), ("1_3", 13), ("13", 13), ("0b1101", 13)]
)
def test_numbers_that_are_read_as_they_are_meant(read, text, value):
    assert read(f"{LEAST}  depth: {text}\n").model_params.depth == value


@pytest.mark.parametrize(
    "text, value", [("0.5", 0.5), ("0", None), ("5e-1", 0.5), ("00.5", 0.5), (".5", 0.5), ("2", 2)]
)
def test_fractions_that_are_read_as_they_are_meant(read, text, value):
    if value is None:
        with pytest.raises(InputError, match=r"mlp_ratio=0\.0 is out of range, wanted more than 0"):
            read(f"{LEAST}  mlp_ratio: {text}\n")
    else:
        assert read(f"{LEAST}  mlp_ratio: {text}\n").model_params.mlp_ratio == value


@pytest.mark.parametrize("text", ["yes", "on", "'true'", "1"])
def test_a_number_is_no_truth_and_a_truth_no_number(read, text):
    if text in ("yes", "on"):
        assert read(f"{LEAST}  qkv_bias: {text}\n").model_params.qkv_bias is True
        with pytest.raises(InputError, match=r"net\.yaml: model_params: depth is True"):
            read(f"{LEAST}  depth: {text}\n")
    else:
        with pytest.raises(InputError, match=r"net\.yaml: model_params: qkv_bias is"):
            read(f"{LEAST}  qkv_bias: {text}\n")


@pytest.mark.parametrize(
    "text, fault",
    [
        (LEAST + "  depth: -3\n", r"model_params: depth=-3 is out of range, wanted 1\.\.999"),
        (LEAST + "diffusion_params:\n  beta_end: 2\n", "diffusion_params: .*beta_end=2"),
        (LEAST + "autoencoder:\n  scale_factor: -1\n", "autoencoder: scale_factor=-1"),
        (LEAST + "t_min: 5\nt_max: 3\n", "t_min=5, t_max=3"),
        ("model_params:\n  img_size: 8\n", "model_params: patch_size not given"),
    ],
)
def test_a_value_that_does_not_do_is_told_with_the_file(read, text, fault):
    with pytest.raises(InputError, match=rf"^\S*net\.yaml: {fault}"):
        read(text)


def test_the_original_authors_places(read):
    text = (
        f"{LEAST}  classifier_type: attention_probe\n"
        "autoencoder:\n  autoencoder_checkpoint_path: ./kl.pth\n"
        "model: deediff_uvit\n"
    )
    config = read(text)
    assert config.classifier_type == "attention_probe" and config.autoencoder.checkpoint_path == "./kl.pth"
    assert read(f"{text}classifier_type: attention_probe\n") == config
    with pytest.raises(InputError, match=r"net\.yaml: model_params\.classifier_type 'attention_probe' contradicts"):
        read(f"{text}classifier_type: mlp_probe_per_layer\n")
    both = text.replace("./kl.pth\n", "./kl.pth\n  checkpoint_path: ./other.pth\n")
    with pytest.raises(
        InputError, match=r"net\.yaml: autoencoder\.autoencoder_checkpoint_path './kl\.pth' contradicts"
    ):
        read(both)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs on Windows")
def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "net.yaml")
    with pytest.raises(InputError, match=r"net\.yaml: is a pipe or device"):
        read_yaml(tmp_path / "net.yaml")
    with pytest.raises(InputError, match="/dev/zero: is a pipe or device"):
        read_yaml(Path("/dev/zero"))


def test_checkpoints_carry_a_complete_description():
    """Also where nothing was stated: another version's defaults do not change a network."""
    params = UViTConfig(img_size=8, patch_size=4)
    carried = carried_settings(Config(model_params=params))
    assert carried.keys() == {f.name for f in dataclasses.fields(Config)}
    assert carried["model_params"] == dataclasses.asdict(params) and carried["model_params"]["conv"] is True
    assert (carried["t_min"], carried["t_max"], carried["real_classes"]) == (0, 999, 0)
    assert build_config(carried, "checkpoint") == Config(model_params=params)


MARKS = set("[]{}'") | {"None"}
NESTED = [[["x"] * 99] * 99] * 99


@pytest.mark.parametrize(
    "value, words",
    [
        (None, "none"),
        (True, "True"),
        (0.5, "0.5"),
        ("cosine", "cosine"),
        ("", "empty"),
        ([], "empty"),
        (["random"], "random"),
        ([3, 5, None], "3, 5, none"),
        ({"scale_factor": 0.5, "checkpoint_path": None}, "scale_factor 0.5, checkpoint_path none"),
        ([{"a": 1}, [2]], "a mapping, a list"),
        (10**400, "a huge number"),
    ],
)
def test_values_in_words(value, words):
    assert in_words(value) == words


@pytest.mark.parametrize("value", ["x" * 999, ["x" * 999] * 99, NESTED, {"x" * 999: NESTED}, dict.fromkeys(range(999))])
def test_words_are_few(value):
    assert len(in_words(value)) <= 80


def test_refusals_show_no_raw_values():
    one = {"class_id": ["random"], "autoencoder": None, "networks": [{"step": 1}], "t_switch": None}
    other = {"class_id": [3, 5], "autoencoder": {"scale_factor": 0.5}, "networks": [], "t_switch": 7}
    said = differences(one, other)
    stages = [
        {"checkpoint_path": "a.pth", "t_min": 3, "t_max": 9},
        {"checkpoint_path": "b.pth", "t_min": 5, "t_max": 9},
    ]
    with pytest.raises(InputError) as refused:
        build(StageFile, {"stages": stages}, "stages.yaml")
    said.append(str(refused.value))
    none = {"model_params": {"depth": None}}
    for wrong in (none, {"t_min": []}, {"model_params": 3}, {"crop": 5}, {"autoencoder": "x"}):
        with pytest.raises(InputError) as refused:
            check_types(Config, {"model_params": {}} | wrong, "net.yaml")
        said.append(str(refused.value))
    assert len(said) == 10
    for message in said:
        assert not any(mark in message.replace("'x'", "") for mark in MARKS), message
    assert "class_id (random and 3, 5)" in said
    assert "net.yaml: t_min is a list, wanted a whole number" in said


@pytest.mark.parametrize(
    "carried, stated, said",
    [(13, 13, []), (3, 5, ["depth (3 and 5)"]), (None, 5, []), (5, None, []), (None, None, [])],
)
def test_what_is_not_stated_contradicts_nothing(carried, stated, said):
    assert contradictions({"depth": carried}, {"depth": stated}) == said


def test_an_even_depth_is_the_odd_one_above():
    """One block in the middle, depth // 2 on either side."""
    depths = {depth: UViTConfig(img_size=8, patch_size=4, depth=depth) for depth in (1, 2, 3, 12, 13, 999)}
    assert {depth: config.num_blocks for depth, config in depths.items()} == {
        depth: 2 * (depth // 2) + 1 for depth in depths
    }
    assert depths[12] == depths[13]


OF_THE_PAPER = sorted(path for path in CONFIGS.glob("*.yaml") if not path.stem.endswith("_public"))


@pytest.mark.parametrize("path", OF_THE_PAPER, ids=lambda path: path.stem)
def test_configs_describe_networks(path):
    """Those of public weights: tests/models/test_public_weights.py."""
    settings = read_yaml(path)
    model = "deediff_uvit" if path.stem.startswith("deediff") else "uvit"
    config = build_config(settings | {"model": model}, str(path))
    params = config.model_params
    found = re.fullmatch(r"[a-z]+_(.*?)(?:_(\d+))?", path.stem)
    assert found is not None
    name, blocks = found.groups()
    of_the_paper = {"celeba": 13, "cifar10": 13, "imagenet64": 17, "imagenet256": 21}
    full = (of_the_paper | {"digits": 7, "emoji16": 7, "emoji32": 9, "fashion_mnist": 9})[name]
    assert params.num_blocks == int(blocks or full)
    assert (params.mlp_ratio, params.qkv_bias) == (4, False)
    if name in of_the_paper:
        width, heads = {"imagenet64": (768, 12), "imagenet256": (1024, 16)}.get(name, (512, 8))
        assert (params.embed_dim, params.num_heads, params.mlp_time_embed) == (width, heads, False)
        assert params.normalize_timesteps == (name in ("celeba", "cifar10"))
        assert params.num_classes == {"imagenet64": 1000, "imagenet256": 1001}.get(name, -1)
        shapes = {"celeba": (64, 4, 3), "cifar10": (32, 2, 3), "imagenet64": (64, 4, 3), "imagenet256": (32, 2, 4)}
        assert (params.img_size, params.patch_size, params.in_chans) == shapes[name]
