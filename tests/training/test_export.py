"""A checkpoint as a folder with a model card, which samplers read again."""

from __future__ import annotations

import json
import shlex

import pytest
import torch
from safetensors.torch import load_file, save_file

import eesampler as eesampler_script
import sampler as sampler_script
import train as train_script
from models import UViT, load_weights
from tests.conftest import TINY, TINY_FLAGS, TRAINING_FLAGS
from training.export import main as export_main

SAMPLING = ["--solver", "ddim", "--steps", "2", "--batch_size", "2", "--device", "cpu", "--quiet"]


def sampled(run_quietly, script, path, out, *flags):
    run_quietly(script.main, ["--checkpoint_path", path, *SAMPLING, *flags, "--output_folder", out])
    return [(out / name).read_bytes() for name in ("000000.png", "000001.png")]


def test_samples_are_the_same(full, tmp_path, run_quietly):
    said = run_quietly(export_main, [full, tmp_path / "net"])
    assert f"ema weights of step 4 -> {tmp_path / 'net'}" in said
    assert {path.name for path in (tmp_path / "net").iterdir()} == {"config.json", "model.safetensors", "README.md"}
    content = json.loads((tmp_path / "net" / "config.json").read_text())
    assert (content["format"], content["weights"], content["step"]) == ("duodiff-1", "ema", 4)
    assert content["config"]["model_params"]["depth"] == 5
    images = sampled(run_quietly, sampler_script, tmp_path / "net", tmp_path / "a")
    assert images == sampled(run_quietly, sampler_script, full, tmp_path / "b")
    network = UViT(**TINY, depth=5)
    load_weights(network, tmp_path / "net")
    stored = load_file(tmp_path / "net" / "model.safetensors")
    assert all(torch.equal(value, stored[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("precision, dtype, step", [("fp16", torch.float16, 2**-11), ("bf16", torch.bfloat16, 2**-8)])
def test_half_precision(precision, dtype, step, full, tmp_path, run_quietly):
    """Half the bytes, each weight the nearest that there is, and samplers read them."""
    for name, flags in (("whole", []), ("half", ["--precision", precision])):
        run_quietly(export_main, [full, tmp_path / name, *flags])
    whole, half = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "half"))
    assert {value.dtype for value in half.values()} == {dtype}
    assert f"| weights | averaged (EMA), in {str(dtype)[6:]} |" in (tmp_path / "half" / "README.md").read_text()
    for name, value in whole.items():
        assert ((half[name].float() - value).abs() <= step * value.abs() + 2**-25).all()
    network = UViT(**TINY, depth=5)
    load_weights(network, tmp_path / "half")
    assert all(torch.equal(value, half[name].float()) for name, value in network.state_dict().items())
    sampled(run_quietly, sampler_script, tmp_path / "half", tmp_path / "images")


def test_a_weight_too_large_for_fp16_is_named(full, tmp_path, fails):
    content = torch.load(full, weights_only=True)
    content["ema"]["norm.bias"][0] = 70_000
    torch.save(content, tmp_path / "large.pth")
    fails(export_main, [tmp_path / "large.pth", tmp_path / "net", "--precision", "fp16"], "fp16: norm.bias", "finite")
    assert not (tmp_path / "net").exists()


def test_early_exit_too(early_exit, tmp_path, run_quietly, fails):
    run_quietly(export_main, [early_exit, tmp_path / "ee", "--weights", "raw"])
    assert "eesampler.py --checkpoint_path" in (tmp_path / "ee" / "README.md").read_text()
    flags = ["--threshold", 0.3]
    got = sampled(run_quietly, eesampler_script, tmp_path / "ee", tmp_path / "a", *flags)
    assert got == sampled(run_quietly, eesampler_script, early_exit, tmp_path / "b", *flags, "--weights", "raw")
    argv = ["--checkpoint_path", tmp_path / "ee", "--output_folder", tmp_path / "c", "--device", "cpu"]
    fails(sampler_script.main, argv, "is a deediff_uvit", "eesampler.py samples from it")


def test_the_card(runs, tmp_path, run_quietly):
    """Its command runs as it stands there."""
    run_quietly(export_main, [runs / "no_class" / "digits_uvit_last.pth", tmp_path / "a net"])
    card = (tmp_path / "a net" / "README.md").read_text()
    for words in (
        *("# a net\n", "| network | uvit, 3 blocks |", "| makes | images of 1 x 8 x 8 |", "| steps | 4 |"),
        *("| classes | 10, and class 10 for none |", "| data | digits, crop none |", "linear betas 0.0001..0.02"),
    ):
        assert words in card, card
    script, *words = shlex.split(card.split("```\n")[1])[1:]
    assert script == "sampler.py"
    words[words.index("out/samples")] = str(tmp_path / "out")
    run_quietly(sampler_script.main, [*words, *SAMPLING])
    assert len(list((tmp_path / "out").glob("*.png"))) == 16


@pytest.fixture
def scores(full, tmp_path, run_quietly):
    """Of samples of the full network, as fid.py writes them."""
    sampled(run_quietly, sampler_script, full, tmp_path / "scored", "--seed", 3)
    about = json.loads((tmp_path / "scored" / "report" / "statistics.json").read_text())
    path = tmp_path / "scored" / "report" / "metrics.json"
    content = {"fid": 12.3456, "n_samples": 2, "reference": {"dataset": "digits", "n_reference": 1797}}
    content |= {"feature_extractor": {"name": "tiny"}, "run": {key: about[key] for key in ("backbones", "settings")}}
    path.write_text(json.dumps(content))
    return path


def test_scores_with_what_they_depend_on(full, shallow, scores, tmp_path, run_quietly, fails):
    run_quietly(export_main, [full, tmp_path / "net", "--scores", scores])
    card = (tmp_path / "net" / "README.md").read_text()
    for words in (
        *("| fid | 12.35 |", "| samples | 2 |", "| reference | dataset digits, n_reference 1797 |"),
        *("| feature extractor | name tiny |", "| seed | 3 |", "| solver | ddim |", "| steps | 2 |"),
    ):
        assert words in card, card
    fails(export_main, [shallow, tmp_path / "other", "--scores", scores], "another network", "depth (1 and 5)")
    fails(export_main, [full, tmp_path / "raw", "--weights", "raw", "--scores", scores], "weights (raw and ema)")
    scores.write_text('{"fid": 3}')
    fails(export_main, [full, tmp_path / "other", "--scores", scores], "metrics.json that fid.py wrote")
    assert not (tmp_path / "other").exists()


def test_an_export_is_replaced_and_nothing_else(full, shallow, tmp_path, run_quietly, fails):
    run_quietly(export_main, [full, tmp_path / "net"])
    run_quietly(export_main, [shallow, tmp_path / "net"])
    sampled(run_quietly, sampler_script, tmp_path / "net", tmp_path / "out")
    fails(export_main, [tmp_path / "net" / "model.safetensors", tmp_path / "net"], "is the file to read")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("mine")
    fails(export_main, [full, tmp_path / "mine"], "is not from export.py")
    (tmp_path / "file").write_text("mine")
    fails(export_main, [full, tmp_path / "file"], "is not from export.py")
    assert (tmp_path / "mine" / "README.md").read_text() == "mine"
    for name in ("out.pth", "out.bin"):
        fails(export_main, [full, tmp_path / name], ".safetensors", "folder")
    fails(export_main, [full, tmp_path / "w.safetensors", "--scores", full], "--scores")


def test_a_folder_that_was_altered(full, shallow, tmp_path, run_quietly, fails):
    argv = ["--checkpoint_path", tmp_path / "net", "--output_folder", tmp_path / "out", "--device", "cpu"]
    run_quietly(export_main, [full, tmp_path / "net"])
    run_quietly(export_main, [shallow, tmp_path / "other"])
    weights = (tmp_path / "net" / "model.safetensors").read_bytes()
    (tmp_path / "net" / "model.safetensors").write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    fails(sampler_script.main, argv, "belong to different networks", "model_params.depth")
    (tmp_path / "net" / "model.safetensors").write_bytes(weights[:1000])
    fails(sampler_script.main, argv, "not readable as safetensors")
    (tmp_path / "net" / "model.safetensors").unlink()
    fails(sampler_script.main, argv, "model.safetensors: no such file")
    save_file(UViT(**TINY).state_dict(), tmp_path / "net" / "model.safetensors")
    fails(sampler_script.main, argv, "belong to different networks")
    for text in ('{"format": "duodiff-1", "config": {"model_params": 3}}', '{"format": "duodiff-1", "config": 3}'):
        (tmp_path / "net" / "config.json").write_text(text)
        fails(sampler_script.main, argv, "config.json")


def test_it_is_no_start_for_training(full, tmp_path, run_quietly, fails):
    run_quietly(export_main, [full, tmp_path / "net"])
    flags = [*TINY_FLAGS, *TRAINING_FLAGS, "--n_steps", 1, "--log_path", tmp_path, "--init_from", tmp_path / "net"]
    fails(train_script.main, flags, "is a folder")
