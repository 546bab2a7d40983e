"""Stages that save work: what is made, what runs, what is counted, what is refused."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
import yaml

import sampler
from common.errors import InputError
from generation.settings import SamplerSettings, SavingSettings
from generation.stages import StageEntry, StageFile, plan_of, read_stages, stages_described, write_stages
from models.early_exit import EarlyExitUViT
from models.loading import load_network
from tests.folders import equal, statistics

FLAGS = ["--device", "cpu", "--quiet", "--batch_size", 2]


@pytest.fixture
def duo(full, shallow):
    return ["--checkpoint_path", shallow, "--checkpoint_path_late", full, *FLAGS]


@pytest.mark.parametrize("interval", ["correct_every", "hold_every", "reuse_every"])
def test_interval_1_is_the_plain_network_bit_for_bit(interval, duo, make):
    argv = [*duo, "--t_switch", 9]
    plain, about = make("plain", argv)
    images, same = make("one", [*argv, f"--{interval}", 1])
    assert equal(plain, images) and about["stages"] == same["stages"]


@pytest.mark.parametrize(
    ("saving", "shallow_calls", "full_calls"),
    [
        (["--correct_every", 4], 20, 3),  # 10 steps alone, 10 beside the full network
        (["--correct_every", 3, "--correct_order", 0], 20, 4),
        (["--hold_every", 4], 10, 3),
        (["--hold_every", 7, "--hold_order", 0], 10, 2),
    ],
)
def test_what_runs_is_counted_as_it_runs(saving, shallow_calls, full_calls, duo, make, counted):
    shallow_steps = 20 if "--correct_every" in saving else 10
    _, about = make("s", [*duo, "--t_switch", 9, *saving])
    assert [network["calls"] for network in about["backbones"]] == [shallow_calls, full_calls]
    assert [network["timesteps"] for network in about["backbones"]] == [shallow_steps, 10], "of their stages"
    assert counted == [2 * about["network_flops_per_image"]], "of two images"
    assert about["device_type"] == "cpu", "whatever the CPU is called"


def test_the_table_tells_steps_and_calls_of_a_held_network(full, tmp_path, run_quietly):
    """Of 20 steps, the network runs at the first and at every second after it: 10 calls in each of 3 batches."""
    write_stages(tmp_path / "s.yaml", StageFile(stages=(entry(full, 0, 19, hold_every=2),)))
    argv = [
        "--stages",
        tmp_path / "s.yaml",
        "--n_samples",
        6,
        "--batch_size",
        2,
        "--device",
        "cpu",
        "--output_folder",
        tmp_path / "s",
    ]
    said = run_quietly(sampler.main, argv)
    assert re.search(r"^backbone +20 +30 ", said, re.MULTILINE), said
    (about,) = statistics(tmp_path / "s")["backbones"]
    assert about["flops_per_image"] == 10 * about["flops_per_image_call"]


def test_batches_processes_and_guidance(runs, make):
    """A forecast starts anew with each batch, and an image does not depend on the batch that it is made in."""
    network = runs / "no_class" / "digits_uvit_last.pth"
    argv = ["--checkpoint_path", network, "--checkpoint_path_late", network, "--t_switch", 12, "--guidance_scale", 0.5]
    argv += ["--guidance_scale_late", 1, "--correct_every", 3, *FLAGS]
    whole, _ = make("whole", [*argv, "--n_samples", 5])
    make("parts", [*argv, "--n_samples", 2])
    assert equal(make("parts", [*argv, "--n_samples", 5])[0], whole)
    ones, _ = make("ones", [*argv, "--n_samples", 5, "--batch_size", 1])
    assert all(np.abs(ones[key].astype(int) - whole[key]).max() <= 1 for key in whole)


def test_under_guidance_a_correction_of_itself_changes_nothing(runs, make):
    """The difference between a network and itself is 0, guided alike; so is every forecast of it."""
    network = runs / "no_class" / "digits_uvit_last.pth"
    pair = ["--checkpoint_path", network, "--checkpoint_path_late", network, "--t_switch", 12, "--guidance_scale", 1]
    plain, _ = make("plain", [*pair, *FLAGS])
    for order in (0, 1):
        images, _ = make(str(order), [*pair, *FLAGS, "--correct_every", 3, "--correct_order", order])
        assert equal(images, plain)


def test_all_images_leave_at_one_layer(runs, make, counted):
    """At the last, the network is its backbone; before, its output is that of the exit head of a full run."""
    exits, backbone = runs / "ee" / "digits_deediff_uvit_last.pth", runs / "full" / "digits_uvit_last.pth"
    plain, _ = make("plain", ["--checkpoint_path", backbone, *FLAGS])
    flops_plain = counted.pop()
    images, about = make("last", ["--checkpoint_path", exits, "--exit_layer", 5, *FLAGS])
    assert equal(images, plain)
    assert counted == [flops_plain] == [2 * about["network_flops_per_image"]]
    _, about = make("early", ["--checkpoint_path", exits, "--exit_layer", 2, *FLAGS])
    assert counted[1] == 2 * about["network_flops_per_image"] < 0.6 * flops_plain
    model = load_network(exits, {}, EarlyExitUViT).module
    x, t = torch.randn(3, 1, 8, 8), torch.full((3,), 7)
    everything, time = model(x, t), model.uvit.time_tokens(t)
    for layer, wanted in enumerate([*everything.exit_outputs, everything.output]):
        torch.testing.assert_close(model.leave_at(layer, x, time), wanted, rtol=1e-4, atol=1e-5)


def entry(path, t_min, t_max, **more) -> StageEntry:
    return StageEntry(checkpoint_path=path, t_min=t_min, t_max=t_max, **more)


def test_a_file_says_what_the_flags_say(duo, full, shallow, make, tmp_path):
    stages = (
        entry(shallow, 10, 19),
        entry(full, 0, 9, correct_every=4, correct_order=1, correct_with=shallow),
    )
    write_stages(tmp_path / "s.yaml", StageFile(stages=stages))
    read = read_stages(tmp_path / "s.yaml").stages[1]
    assert (read.saving, read.correct_with.resolve()) == (stages[1].saving, shallow.resolve())
    written = yaml.safe_load((tmp_path / "s.yaml").read_text())["stages"]
    of_stage = ("checkpoint_path", "t_min", "t_max", "correct_with", "correct_every", "correct_order")
    assert written[1].keys() == {*of_stage}
    by_file, about = make("file", ["--stages", tmp_path / "s.yaml", *FLAGS])
    by_flags, same = make("flags", [*duo, "--t_switch", 9, "--correct_every", 4])
    assert equal(by_file, by_flags) and about["stages"] == same["stages"]
    del written[1]["correct_with"]  # the network of the first stage
    written[0]["checkpoint_path"], written[1]["checkpoint_path"] = str(shallow), str(full)
    (tmp_path / "short.yaml").write_text(yaml.safe_dump({"stages": written}))
    assert equal(make("short", ["--stages", tmp_path / "short.yaml", *FLAGS])[0], by_file)


def test_the_record_says_the_stages(full, shallow, tmp_path):
    stages = (
        entry(full, 15, 19, reuse_every=3, reuse_order=1, reuse_outer=2, guidance_scale=0.5, guidance_t_max=18),
        entry(full, 0, 14, correct_every=4, correct_with=shallow),
    )
    write_stages(tmp_path / "s.yaml", StageFile(stages=stages))
    plan = plan_of(SamplerSettings(stages=tmp_path / "s.yaml", output_folder=tmp_path / "s"))
    assert [path.resolve() for path, _ in plan.files] == [shallow, full], "the network of the last stage is the last"
    again = stages_described(plan.described(20), tmp_path)
    assert plan.described(20) == type(plan)(plan.files, again).described(20)
    assert again[0].saving == SavingSettings(reuse_every=3, reuse_order=1, reuse_outer=2) and again[1].cheap == 0
    for broken in ([3], [{"network": 0}], [{**plan.described(20)[0], "t_min": "x"}]):
        with pytest.raises(InputError, match=r"report/run\.json"):
            stages_described(broken, tmp_path)


def test_saving_in_half_precision(duo, make):
    argv = [*duo, "--t_switch", 9, "--correct_every", 3, "--precision"]
    fp32, bf16 = (np.stack(list(make(name, [*argv, name])[0].values())).astype(int) for name in ("fp32", "bf16"))
    assert 0 < np.abs(fp32 - bf16).mean() < 3.0, "of 255 levels, after twenty steps"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--correct_every", 2, "--hold_every", 2], ["correct_every and hold_every", "one of them"]),
        (["--correct_order", 1], ["correct_order needs a correct_every of 2 or more"]),
        (["--hold_every", 2, "--hold_order", 2], ["--hold_order", "0..1"]),
        (["--exit_layer", 2], ["is a uvit, wanted a deediff_uvit"]),
        (["--exit_layer", 2, "--reuse_every", 2], ["exit_layer and reuse_every"]),
    ],
)
def test_bad_flags_end_in_one_line(flags, words, duo, tmp_path, fails):
    fails(sampler.main, [*duo, "--t_switch", 9, *flags, "--output_folder", tmp_path / "s"], *words)
    assert not (tmp_path / "s").exists()


def test_what_does_not_fit_ends_in_one_line(runs, full, shallow, tmp_path, fails):
    out = [*FLAGS, "--output_folder", tmp_path / "s"]
    exits = runs / "ee" / "digits_deediff_uvit_last.pth"
    fails(sampler.main, ["--checkpoint_path", full, "--correct_every", 2, *out], "--correct_every", "_late")
    fails(sampler.main, ["--checkpoint_path", exits, "--exit_layer", 6, *out], "exit_layer=6", "wanted 0..5")
    listed = [{"checkpoint_path": str(full), "t_min": 0, "t_max": 19, "correct_every": 2}]
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({"stages": listed}))
    by_file = ["--stages", tmp_path / "s.yaml", *out]
    fails(sampler.main, by_file, "s.yaml: stages 1", "correct_with")
    fails(sampler.main, [*by_file, "--hold_every", 2], "--hold_every and --stages")
    listed[0] |= {"correct_every": 1, "correct_with": str(shallow)}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({"stages": listed}))
    fails(sampler.main, by_file, "s.yaml: stages 1", "correct_with needs a correct_every")
    assert not (tmp_path / "s").exists()
