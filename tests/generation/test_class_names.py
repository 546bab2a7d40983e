"""Classes of ImageNet by their names."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

import sampler as sampler_script
from common.errors import InputError
from data.imagenet import IMAGENET_CLASSES, SYNSETS, label_of_name
from models import UViT

SHAPE = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 32, "num_heads": 4, "depth": 1}


@pytest.mark.parametrize(
    ("name", "synset"),
    [
        ("golden retriever", "n02099601"),
        ("Golden_Retriever", "n02099601"),
        ("tench", "n01440764"),
        ("African grey", "n01817953"),
        ("toilet tissue", "n15075141"),
    ],
)
def test_the_label_is_the_place_among_the_sorted_wordnet_ids(name, synset):
    """The ids are WordNet's own; training takes their places for labels."""
    assert label_of_name(name) == SYNSETS.read_text().split().index(synset)


@pytest.mark.parametrize(
    ("name", "words"),
    [("golden retreiver", "golden retriever"), ("retriever", "labrador retriever"), ("zzzz", "nor similar to one")],
)
def test_others_are_told_the_nearest(name, words):
    with pytest.raises(InputError, match=words) as raised:
        label_of_name(name)
    assert "\n" not in str(raised.value)


@pytest.fixture
def network(tmp_path):
    torch.save(UViT(**SHAPE, num_classes=IMAGENET_CLASSES).state_dict(), tmp_path / "net.pth")
    described = {"dataset": "imagenet64", "model_params": {**SHAPE, "num_classes": IMAGENET_CLASSES}}
    (tmp_path / "net.yaml").write_text(yaml.safe_dump(described))
    argv = ["--checkpoint_path", tmp_path / "net.pth", "--config_path", tmp_path / "net.yaml", "--device", "cpu"]
    return [*argv, "--quiet", "--solver", "ddim", "--steps", 2, "--n_samples", 2, "--output_folder"]


def test_the_samples_are_those_of_the_number(network, tmp_path, run_quietly):
    """And the run goes on whichever it was given by."""
    run_quietly(sampler_script.main, [*network, tmp_path / "a", "--class_name", "golden retriever", "tench"])
    run_quietly(sampler_script.main, [*network, tmp_path / "b", "--class_id", 207, 0])
    for name in ("000000.png", "000001.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert json.loads((tmp_path / "a" / "report" / "run.json").read_text())["class_id"] == [207, 0]
    run_quietly(sampler_script.main, [*network, tmp_path / "a", "--class_id", 207, 0, "--n_samples", 3])


def test_bad_input(network, runs, tmp_path, fails):
    fails(
        sampler_script.main,
        [*network, tmp_path / "a", "--class_name", "golden retreiver"],
        "did you mean golden retriever,",
    )
    fails(sampler_script.main, [*network, tmp_path / "a", "--class_name", "tench", "--class_id", 1], "give one of them")
    digits = ["--checkpoint_path", runs / "classes" / "digits_uvit_last.pth", "--output_folder", tmp_path / "a"]
    fails(sampler_script.main, [*digits, "--class_name", "tench"], "has 10 of digits", "--class_id")
    assert not (tmp_path / "a").exists()
