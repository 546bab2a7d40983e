"""Training through the scripts: what a step sees, and that going on is never having stopped."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import main as main_script
import pack
import train as train_script
from models import UViT
from tests import processes
from tests.conftest import TINY_FLAGS, TRAINING_FLAGS
from training import loop
from training.settings import OptimisationSettings
from training.step import learning_rate

FLAGS = [*TINY_FLAGS, *TRAINING_FLAGS, "--depth", "3"]


def train(log_path, *flags, name="run", steps=20):
    argv = [*FLAGS, "--n_steps", str(steps), "--log_path", str(log_path), "--exp_name", name]
    train_script.main([*argv, *map(str, flags)])
    return log_path / name


def checkpoint(folder, name="digits_uvit_last.pth"):
    return torch.load(folder / name, weights_only=True)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def same(a, b) -> bool:
    """Nested containers of tensors and values, bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def same_state(a, b) -> bool:
    return all(same(a[part], b[part]) for part in ("step", "model", "ema", "optimizer", "scaler", "counters"))


@pytest.mark.parametrize("flags", [[], ["--use_amp"], ["--use_amp", "--amp_dtype", "float16"], ["--num_workers", "1"]])
def test_20_steps_are_10_steps_a_save_a_load_and_10_more(flags, tmp_path):
    flags = [*flags, "--lr_schedule", "constant"]
    unbroken = train(tmp_path, *flags, name="unbroken")
    broken = train(tmp_path, *flags, name="broken", steps=10)
    train(tmp_path, *flags, "--resume", name="broken")
    assert same_state(checkpoint(unbroken), checkpoint(broken))
    timeless = [
        [{k: v for k, v in m.items() if k != "steps_per_second"} for m in metrics(f)] for f in (unbroken, broken)
    ]
    # The run of 10 steps logged its end, step 10, which the unbroken one did not.
    assert timeless[0] == [m for m in timeless[1] if m["step"] != 10]


def test_a_run_goes_on_from_a_checkpoint_between_two_logs(tmp_path):
    unbroken = train(tmp_path, name="unbroken", steps=12)
    broken = train(tmp_path, "--save_new_every_n_steps", 7, name="broken", steps=12)
    (broken / "digits_uvit_last.pth").unlink()
    train(tmp_path, "--resume", name="broken", steps=12)
    assert same_state(checkpoint(unbroken), checkpoint(broken))
    assert [m["loss"] for m in metrics(unbroken)] == [m["loss"] for m in metrics(broken)]
    assert [m["step"] for m in metrics(broken)] == [4, 8, 12]


def test_load_checkpoint_path_goes_on_in_a_new_run(tmp_path):
    unbroken = train(tmp_path, "--save_new_every_n_steps", 4, name="unbroken", steps=8)
    start = unbroken / "digits_uvit_step-4.pth"
    moved = train(tmp_path, "--load_checkpoint_path", start, name="moved", steps=8)
    assert same_state(checkpoint(unbroken), checkpoint(moved))


def test_options_of_the_optimiser_are_this_runs(tmp_path):
    start = train(tmp_path, name="start", steps=4) / "digits_uvit_last.pth"
    flags = ["--load_checkpoint_path", start, "--weight_decay", 0, "--beta1", 0.5, "--beta2", 0.7]
    (group,) = checkpoint(train(tmp_path, *flags, name="other", steps=5))["optimizer"]["param_groups"]
    assert (group["weight_decay"], tuple(group["betas"])) == (0, (0.5, 0.7))


def test_previews_have_no_more_steps_than_there_are_timesteps(tmp_path):
    run = train(tmp_path, "--num_timesteps", 3, "--preview_steps", 20, "--n_samples", 2, steps=1)
    assert (run / "previews" / "step-1.png").exists()


@pytest.mark.parametrize("packed", [False, True])
def test_classes_of_a_folder_leave_one_for_none(packed, tmp_path):
    images = tmp_path / "images"
    for name in ("cats", "dogs"):
        (images / name).mkdir(parents=True)
        for i in range(3):
            Image.new("L", (8, 8), 10 * i).save(images / name / f"{i}.png")
    where = ["--dataset", "folder", "--data_path", images, "--num_classes", 3]
    if packed:
        pack.main([str(arg) for arg in [*where, "--img_size", 8, "--in_chans", 1, "--num_workers", 0]])
    run = train(tmp_path, *where, "--batch_size", 2, "--label_dropout", 0.5, steps=2)
    assert checkpoint(run, "folder_uvit_last.pth")["config"]["real_classes"] == 2


def test_heads_may_learn_from_other_data(full, tmp_path):
    for i in range(3):
        Image.new("L", (8, 8), 10 * i).save(tmp_path / f"{i}.png")
    flags = ["--dataset", "folder", "--data_path", tmp_path, "--batch_size", 2, "--n_steps", 1, "--num_timesteps", 20]
    flags += ["--model", "deediff_uvit", "--load_backbone", full, "--freeze_backbone", "--log_path", tmp_path / "logs"]
    main_script.main([str(arg) for arg in [*flags, "--classifier_type", "attention_probe", "--preview_steps", 0]])
    (path,) = (tmp_path / "logs").rglob("*_last.pth")
    assert torch.load(path, weights_only=True)["config"]["crop"] == "fit"


def test_heads_on_bare_weights_take_the_crop_of_their_config(full, tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "1.png")
    settings = torch.load(full, weights_only=True)["config"]
    torch.save(UViT(**settings["model_params"]).state_dict(), tmp_path / "bare.pth")
    stated = {"model_params": settings["model_params"], "crop": "halve", "classifier_type": "attention_probe"}
    (tmp_path / "net.yaml").write_text(yaml.safe_dump(stated))
    flags = ["--dataset", "folder", "--data_path", tmp_path, "--batch_size", 1, "--n_steps", 1, "--preview_steps", 0]
    flags += [
        "--model",
        "deediff_uvit",
        "--load_backbone",
        tmp_path / "bare.pth",
        "--config_path",
        tmp_path / "net.yaml",
    ]
    main_script.main([str(arg) for arg in [*flags, "--freeze_backbone", "--log_path", tmp_path / "logs"]])
    (path,) = (tmp_path / "logs").rglob("*_last.pth")
    assert torch.load(path, weights_only=True)["config"]["crop"] == "halve"


def test_load_checkpoint_path_starts_from_bare_weights(tmp_path, full):
    weights = UViT(**(torch.load(full, weights_only=True)["config"]["model_params"] | {"depth": 3})).state_dict()
    torch.save(weights, tmp_path / "bare.pth")
    run = train(tmp_path, "--load_checkpoint_path", tmp_path / "bare.pth", "--lr", 1e-12, steps=1)
    got = checkpoint(run)
    assert got["step"] == 1
    for part in ("model", "ema"):
        torch.testing.assert_close(got[part]["pos_embed"], weights["pos_embed"])


def test_previews_leave_training_alone(tmp_path):
    without = train(tmp_path, name="without", steps=8)
    seen = train(tmp_path, "--preview_steps", 2, "--n_samples", 3, name="with", steps=8)
    assert same_state(checkpoint(without), checkpoint(seen))
    assert sorted(p.name for p in (seen / "previews").iterdir()) == ["step-4.png", "step-8.png"]


def test_accumulated_gradients_are_those_of_the_batch(tmp_path):
    whole, parts = (train(tmp_path, "--grad_accum_steps", n, "--lr", 1e-3, name=f"by{n}", steps=4) for n in (1, 4))
    for a, b in zip(checkpoint(whole)["model"].values(), checkpoint(parts)["model"].values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5)


def test_the_seed_decides(tmp_path):
    first, again, other = (
        train(tmp_path, "--seed", seed, name=name, steps=2) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert same_state(checkpoint(first), checkpoint(again))
    assert not same(checkpoint(first)["model"], checkpoint(other)["model"])


def test_training_learns(tmp_path):
    losses = [
        m["loss"] for m in metrics(train(tmp_path, "--lr", 1e-2, "--beta1", 0.9, "--num_timesteps", 1000, steps=120))
    ]
    assert np.mean(losses[-5:]) < 0.75 * losses[0]


def test_a_frozen_backbone_stays_and_is_not_optimised(runs):
    full, ee = checkpoint(runs / "full"), checkpoint(runs / "ee", "digits_deediff_uvit_last.pth")
    averaged = full["model"] | full["ema"]
    assert all(torch.equal(ee["model"][f"uvit.{name}"], value) for name, value in averaged.items())
    heads = [name for name in ee["model"] if not name.startswith("uvit.")]
    assert len(ee["optimizer"]["state"]) == len(ee["ema"]) == len(heads)


def test_without_freezing_all_is_trained(runs, tmp_path):
    main_script.main(
        [
            *(*TINY_FLAGS, *TRAINING_FLAGS, "--model", "deediff_uvit", "--depth", "3", "--n_steps", "2"),
            *("--classifier_type", "attention_probe", "--log_path", str(tmp_path), "--use_unweighted_loss"),
        ]
    )
    got = checkpoint(tmp_path / "digits_deediff_uvit_3", "digits_deediff_uvit_last.pth")
    assert len(got["optimizer"]["state"]) == len(got["model"])
    assert {"simple", "uncertainty", "ual", "unweighted", "loss"} <= metrics(tmp_path / "digits_deediff_uvit_3")[
        0
    ].keys()


def test_a_folder_of_images_trains_with_classes_and_flips(tmp_path):
    for name in ("cats", "dogs"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(5):
            pixels = np.random.default_rng(i).integers(0, 256, (10, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.jpg")
    flags = ["--img_size", "8", "--patch_size", "4", "--embed_dim", "32", "--num_heads", "4", "--depth", "1"]
    flags += ["--dataset", "folder", "--data_path", str(tmp_path / "images"), "--num_classes", "2"]
    flags += ["--batch_size", "4", "--n_steps", "6", "--log_path", str(tmp_path), "--n_samples", "2"]
    flags += ["--preview_steps", "2", "--grad_checkpointing"]
    train_script.main(flags)
    assert (tmp_path / "folder_uvit_1" / "folder_uvit_last.pth").exists()


def test_label_dropout_is_as_often_as_asked(tmp_path, monkeypatch):
    seen = []
    forward = UViT.forward
    monkeypatch.setattr(UViT, "forward", lambda self, x, t, y=None: seen.append(y) or forward(self, x, t, y))
    train(tmp_path, "--num_classes", 11, "--label_dropout", 0.3, "--batch_size", 100, steps=10)
    labels = torch.cat(seen)
    assert 0.25 < (labels == 10).float().mean() < 0.35
    assert set(labels.tolist()) == set(range(11))


def test_learning_rate():
    cosine = OptimisationSettings(lr=2.0, num_warmup_steps=10, lr_schedule="cosine")
    assert [learning_rate(step, 110, cosine) for step in (0, 4, 9, 10)] == [0.2, 1.0, 2.0, 2.0]
    assert learning_rate(60, 110, cosine) == pytest.approx(1.0)
    assert learning_rate(110, 110, cosine) == pytest.approx(0.0)
    assert learning_rate(109, 110, replace(cosine, lr_schedule="constant")) == 2.0


@pytest.mark.parametrize("steps, warmup, said", [(3, [], True), (3, [4], True), (3, [3], False), (4, [3], False)])
def test_a_warm_up_longer_than_the_run_is_noted(steps, warmup, said, tmp_path, caplog, monkeypatch):
    """The default is 1500. Whether one is longer is seen by the highest learning rate there was."""
    rates = []

    def recorded(*state):
        rates.append(learning_rate(*state))
        return rates[-1]

    monkeypatch.setattr(loop, "learning_rate", recorded)
    plain = [word for word in TRAINING_FLAGS if word not in ("--num_warmup_steps", "2")]
    argv = [*TINY_FLAGS, *plain, "--depth", 1, "--n_steps", steps, "--log_path", tmp_path, "--lr", 0.5]
    train_script.main([str(word) for word in [*argv, *(["--num_warmup_steps", *warmup] if warmup else [])]])
    assert (max(rates) < 0.5) == said
    noted = [f"--num_warmup_steps {(warmup or [1500])[0]} is more than --n_steps 3: the learning rate never reaches"]
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == said and all(message.startswith(*noted) for message in messages)


class TestFinished:
    """A queue may give the command of a run that is finished once more."""

    @pytest.fixture
    def finished(self, runs, tmp_path):
        shutil.copytree(runs / "shallow", tmp_path / "shallow")
        argv = [*TINY_FLAGS, *TRAINING_FLAGS, "--n_steps", 4, "--depth", 1, "--log_path", tmp_path, "--resume"]
        return tmp_path / "shallow", [*argv, "--exp_name", "shallow"]

    @staticmethod
    def state(folder):
        return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    @pytest.mark.parametrize("script, flags", [(train_script, []), (main_script, ["--model", "uvit"])])
    def test_it_is_said_and_nothing_changes(self, script, flags, finished, run_quietly, caplog):
        folder, argv = finished
        before = self.state(folder)
        said = run_quietly(script.main, [*argv, *flags])
        assert said == f"finished already: {folder / 'digits_uvit_last.pth'} is at step 4 of 4\n"
        assert self.state(folder) == before and not caplog.records

    def test_all_processes_end_well(self, finished):
        folder, argv = finished
        output = folder.parent / "said.txt"
        assert processes.run("train", argv, output, processes=2) == [0, 0]
        assert output.read_text().count("finished already") == 1

    def test_early_exit(self, runs, tmp_path, run_quietly):
        shutil.copytree(runs / "ee", tmp_path / "ee")
        argv = [*TINY_FLAGS, *TRAINING_FLAGS, "--n_steps", 4, "--depth", 5, "--log_path", tmp_path, "--exp_name", "ee"]
        argv += ["--model", "deediff_uvit", "--classifier_type", "mlp_probe_per_layer", "--freeze_backbone"]
        argv += ["--load_backbone", runs / "full" / "digits_uvit_last.pth", "--resume"]
        assert "finished already" in run_quietly(main_script.main, argv)


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_another_number_of_steps_is_one_statement(schedule, tmp_path, caplog):
    """By what a run of the first steps leaves: under cosine the same step learns at another rate."""
    flags = ["--lr_schedule", schedule, "--log_every_n_steps", 1, "--save_new_every_n_steps", 1]
    train(tmp_path, *flags, steps=4)
    train(tmp_path, *flags, steps=6, name="long")
    train(tmp_path, *flags, "--resume", "--keep_last", 9, steps=6)
    one, other = (checkpoint(tmp_path / name, "digits_uvit_step-4.pth") for name in ("run", "long"))
    messages = [record.getMessage() for record in caplog.records]
    noted = [message for message in messages if "do not change the result" in message]
    assert len(noted) == 1 and "keep_last (none and 9)" in noted[0]
    if schedule == "constant":
        assert same_state(one, other)
        assert messages == noted and "n_steps (4 and 6)" in noted[0]
    else:
        assert not same(one["model"], other["model"])
        assert "n_steps" not in noted[0].replace("log_every_n_steps", "").replace("save_new_every_n_steps", "")
        assert sorted(messages) == sorted([*noted, "the learning rate now falls to 0 at step 6, not 4"])


class TestBadInput:
    def test_a_run_is_never_overwritten(self, runs, fails):
        argv = [*TINY_FLAGS, *TRAINING_FLAGS, "--n_steps", 4, "--log_path", runs, "--exp_name", "full"]
        fails(train_script.main, argv, "already contains a run", "--resume")

    def test_resuming_nothing(self, tmp_path, fails):
        fails(train_script.main, [*FLAGS, "--n_steps", 4, "--log_path", tmp_path, "--resume"], "no checkpoint")

    def test_resuming_under_other_settings(self, runs, fails):
        argv = [*TINY_FLAGS, *TRAINING_FLAGS, "--n_steps", 8, "--log_path", runs, "--exp_name", "full", "--resume"]
        fails(train_script.main, [*argv, "--depth", 3], "model_params.depth (5 and 3)")
        fails(train_script.main, [*argv, "--depth", 5, "--seed", 3, "--lr", 1], "seed (0 and 3)", "lr (0.0002 and 1.0)")

    def test_a_damaged_last_checkpoint_is_passed_over(self, runs, tmp_path, caplog):
        shutil.copytree(runs / "shallow", tmp_path / "run")
        last = tmp_path / "run" / "digits_uvit_last.pth"
        shutil.copy(last, tmp_path / "run" / "digits_uvit_step-4.pth")
        last.write_bytes(last.read_bytes()[:1000])
        argv = [*TINY_FLAGS, *TRAINING_FLAGS, "--n_steps", "6", "--depth", "1", "--log_path", str(tmp_path)]
        train_script.main([*argv, "--exp_name", "run", "--resume"])
        assert "skipped a damaged checkpoint" in caplog.text and "digits_uvit_last.pth" in caplog.text
        assert checkpoint(tmp_path / "run")["step"] == 6

    def test_nothing_left_to_do(self, runs, tmp_path, fails):
        argv = [*TINY_FLAGS, *TRAINING_FLAGS, "--depth", 5, "--exp_name", "full"]
        fails(train_script.main, [*argv, "--log_path", runs, "--n_steps", 3, "--resume"], "step 4 already")
        start = ["--load_checkpoint_path", runs / "full" / "digits_uvit_last.pth"]
        fails(train_script.main, [*argv, "--log_path", tmp_path, "--n_steps", 4, *start], "step 4 already")

    @pytest.mark.parametrize(
        "flags, words",
        [
            (["--n_steps", 0], ["--n_steps", "0"]),
            (["--n_steps", "many"], ["--n_steps", "'many'"]),
            (["--n_steps", 2, "--batch_size", 1798], ["--batch_size 1798", "1797"]),
            (["--n_steps", 2, "--sample_height", 64], ["--sample_height 64", "8 x 8"]),
            (["--n_steps", 2, "--grad_accum_steps", 3], ["--grad_accum_steps 3"]),
            (["--n_steps", 2, "--lr", "nan"], ["--lr"]),
            (["--n_steps", 2, "--exp_name", "a/b"], ["--exp_name a/b"]),
            (["--n_steps", 2, "--num_classes", 5], ["labels 0..9", "num_classes=5"]),
            (["--n_steps", 2, "--dataset", "folder"], ["--data_path"]),
            (["--n_steps", 2, "--img_size", 16], ["8 x 8"]),
            (["--n_steps", 2, "--device", "abacus"], ["--device abacus"]),
            (["--n_steps", 2, "--n_stepz", 3], ["--n_stepz"]),
            (["--n_steps", 2, "--config_path", "nowhere.yaml"], ["nowhere.yaml"]),
        ],
    )
    def test_options(self, flags, words, tmp_path, fails):
        fails(train_script.main, [*FLAGS, "--log_path", tmp_path / "logs", *flags], *words)
        assert not list((tmp_path / "logs").rglob("*.pth")) if (tmp_path / "logs").exists() else True

    @pytest.mark.parametrize(
        "flags, wanted",
        [
            ([], "--img_size and --patch_size"),
            (["--img_size", 8], "--img_size and --patch_size"),
            (["--depth", 3, "--patch_size", 4], "--img_size and --patch_size"),
            (["--model", "dit"], "--input_size and --patch_size"),
        ],
    )
    def test_a_network_without_description(self, flags, wanted, tmp_path, fails):
        argv = ["--dataset", "folder", "--data_path", tmp_path, "--n_steps", 2, "--device", "cpu", *flags]
        said = fails(train_script.main, [*argv, "--log_path", tmp_path / "logs"])
        assert said == f"train.py: the network has no description; give --config_path, or {wanted}\n"

    def test_options_of_early_exit(self, tmp_path, fails, full):
        argv = [*TRAINING_FLAGS, "--n_steps", 2, "--log_path", tmp_path]
        fails(main_script.main, [*argv, *TINY_FLAGS, "--model", "uvit", "--freeze_backbone"], "--freeze_backbone")
        ee = [*argv, "--model", "deediff_uvit"]
        fails(main_script.main, [*ee, *TINY_FLAGS, "--freeze_backbone"], "--load_backbone")
        fails(main_script.main, [*ee, "--load_backbone", full], "classifier_type")
        kind = ["--classifier_type", "attention_probe"]
        fails(main_script.main, [*ee, *kind, "--load_backbone", full, "--depth", 7], "model_params.depth (5 and 7)")

    def test_label_dropout_needs_a_class_for_none(self, tmp_path, fails):
        argv = [*FLAGS, "--n_steps", 2, "--log_path", tmp_path, "--label_dropout", 0.1]
        fails(train_script.main, argv, "--label_dropout 0.1")
        fails(train_script.main, [*argv, "--num_classes", 10], "--label_dropout 0.1", "one more")

    def test_a_state_of_other_parameters(self, runs, tmp_path, fails):
        """The heads were trained alone; here the backbone would be trained along."""
        argv = [*TINY_FLAGS, *TRAINING_FLAGS, "--n_steps", 8, "--log_path", tmp_path, "--model", "deediff_uvit"]
        argv += ["--depth", 5, "--classifier_type", "mlp_probe_per_layer"]
        start = runs / "ee" / "digits_deediff_uvit_last.pth"
        fails(main_script.main, [*argv, "--load_checkpoint_path", start], "does not fit this run")

    def test_going_on_in_place_under_another_seed(self, runs, fails):
        argv = [*TINY_FLAGS, *TRAINING_FLAGS, "--n_steps", 8, "--log_path", runs, "--exp_name", "full", "--depth", 5]
        start = runs / "full" / "digits_uvit_last.pth"
        fails(train_script.main, [*argv, "--load_checkpoint_path", start, "--seed", 9], "seed (0 and 9)")
        fails(train_script.main, [*argv, "--resume", "--random_flip"], "random_flip (False and True)")

    def test_a_class_folder_without_images(self, tmp_path, fails):
        for name in ("cats", "dogs"):
            (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / "images" / "dogs" / "1.png")
        argv = [*FLAGS, "--dataset", "folder", "--data_path", tmp_path / "images", "--num_classes", 2, "--n_steps", 1]
        fails(train_script.main, [*argv, "--log_path", tmp_path], "cats/", "no readable images")

    def test_broken_images_met_by_a_loading_process(self, tmp_path, fails):
        Image.effect_noise((64, 64), 50).save(tmp_path / "1.png")
        (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:900])
        argv = [*FLAGS, "--dataset", "folder", "--data_path", tmp_path, "--n_steps", 1, "--batch_size", 1]
        fails(train_script.main, [*argv, "--num_workers", 1, "--log_path", tmp_path / "l"], "no image can be read")

    @pytest.mark.slow
    def test_no_permission(self, tmp_path, fails):
        (tmp_path / "file").write_text("")
        argv = [*FLAGS, "--n_steps", 2, "--log_path", tmp_path / "file"]
        fails(train_script.main, argv, "file")

    def test_weights_that_are_not_finite_are_not_saved(self, tmp_path, fails, monkeypatch):
        monkeypatch.setattr(loop, "learning_rate", lambda *state: 1e39)
        fails(train_script.main, [*FLAGS, "--n_steps", 8, "--log_path", tmp_path], "not finite", "diverged")
        assert not list(tmp_path.rglob("*.pth"))
