"""Networks for a part of the timesteps: their range, a warm start from a full network, and a teacher."""

from __future__ import annotations

import copy
import functools
import json
import shutil

import pytest
import torch
import yaml
from torch.nn import functional as F

import eesampler
import main as main_script
import sampler
import train as train_script
from common.config import build_config, carried_settings
from models import UViT, load_weights
from models.loading import load_network
from tests.conftest import TINY, TINY_FLAGS, TRAINING_FLAGS, perturbed
from tests.training.test_distributed import assert_same_training, run
from tests.training.test_training import checkpoint, metrics, same, same_state
from training import export
from training.losses import distillation_objective

ANY = [*TINY_FLAGS, *TRAINING_FLAGS]
FLAGS = [*ANY, "--depth", "3"]
LAST = "digits_uvit_last.pth"


def train(log_path, *flags, name="run", steps=4, script=train_script):
    argv = [*FLAGS, "--n_steps", steps, "--log_path", log_path, "--exp_name", name, *flags]
    script.main([str(arg) for arg in argv])
    return log_path / name


@pytest.fixture
def drawn(monkeypatch):
    """The timesteps that networks were called at."""
    seen, forward = [], UViT.forward
    monkeypatch.setattr(UViT, "forward", lambda self, x, t, y=None: seen.extend(t.tolist()) or forward(self, x, t, y))
    return seen


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    return tmp_path_factory.mktemp("parts")


@pytest.fixture(scope="module")
def early(logs):
    """Trained on t >= 8 of 20."""
    return train(logs, "--t_min", 8, "--model", "uvit", name="early", script=main_script) / LAST


@pytest.fixture(scope="module")
def plain(logs):
    """Without the last convolution."""
    return train(logs, "--no-conv", name="plain") / LAST


@pytest.fixture(scope="module")
def late(logs, full):
    """A full network, trained on all timesteps, then on t <= 9."""
    flags = ["--t_max", 9, "--depth", 5, "--load_checkpoint_path", full]
    return train(logs, *flags, name="late", steps=8) / LAST


class TestWithoutTheConvolution:
    """A network without the last convolution says so, wherever it goes."""

    def test_it_travels(self, plain, tmp_path):
        exported = tmp_path / "exported.safetensors"
        export.main([str(plain), str(exported)])
        for file in (plain, exported):
            network = load_network(file, {}, UViT)
            assert network.config.model_params.conv is False
            assert not any("final_layer" in name for name in network.module.state_dict())
        network = load_network(plain, {"model_params": {"conv": False}}, UViT)
        assert not network.config.model_params.conv

    def test_it_goes_on_as_one_that_was_never_stopped(self, plain, logs):
        broken = train(logs, "--no-conv", name="broken", steps=2)
        train(logs, "--no-conv", "--resume", name="broken")
        assert same_state(checkpoint(broken), checkpoint(plain.parent))

    def test_a_contradiction_is_named(self, plain, full, tmp_path, fails):
        for file, depth, conv, words in ((plain, 3, True, "(False and True)"), (full, 5, False, "(True and False)")):
            (tmp_path / "net.yaml").write_text(yaml.safe_dump({"model_params": TINY | {"depth": depth, "conv": conv}}))
            argv = ["--checkpoint_path", file, "--config_path", tmp_path / "net.yaml"]
            fails(sampler.main, [*argv, "--output_folder", tmp_path / "s"], f"conv {words}")

    def test_it_takes_turns_with_one_that_has_it(self, plain, full, tmp_path):
        argv = ["--checkpoint_path", plain, "--checkpoint_path_late", full, "--t_switch", 9, "--n_samples", 2]
        sampler.main([*map(str, argv), "--quiet", "--device", "cpu", "--output_folder", str(tmp_path / "s")])
        recorded = json.loads((tmp_path / "s" / "report" / "run.json").read_text())["networks"]
        assert [network["model_params"]["conv"] for network in recorded] == [False, True]


class TestRange:
    def test_timesteps_are_drawn_from_it_evenly(self, tmp_path, drawn):
        train(tmp_path, "--t_min", 5, "--t_max", 8, "--depth", 1, "--batch_size", 400, steps=5)
        counts = [drawn.count(t) for t in range(20)]
        assert sum(counts) == sum(counts[5:9]) == 2000
        assert all(400 < n < 600 for n in counts[5:9])

    def test_all_of_them_are_the_draws_of_none(self, tmp_path, runs):
        stated = train(tmp_path, "--t_min", 0, "--t_max", 19, "--depth", 5)
        assert same_state(checkpoint(stated), checkpoint(runs / "full"))
        for folder in (stated, runs / "full"):
            assert [checkpoint(folder)["config"][end] for end in ("t_min", "t_max")] == [0, 19]

    def test_it_travels(self, early, late, tmp_path):
        for path, expected in ((early, range(8, 20)), (late, range(10))):
            exported = tmp_path / "exported.safetensors"
            export.main([str(path), str(exported)])
            for file in (path, exported):
                assert load_network(file, {}, UViT).config.trained_timesteps == expected
        assert checkpoint(late.parent)["step"] == 8

    def test_a_run_of_every_timestep_goes_on_as_it_is(self, full, tmp_path, fails):
        (tmp_path / "run").mkdir()
        shutil.copy(full, tmp_path / "run" / LAST)
        argv = [*ANY, "--depth", 5, "--n_steps", 6, "--log_path", tmp_path, "--exp_name", "run", "--resume"]
        fails(train_script.main, [*argv, "--t_min", 3], "t_min (0 and 3)")
        fails(train_script.main, [*argv, "--no-conv"], "conv (True and False)")
        elsewhere = [*argv[:-3], "--exp_name", "new", "--no-conv", "--load_checkpoint_path", tmp_path / "run" / LAST]
        fails(train_script.main, elsewhere, "conv (True and False)")
        fails(train_script.main, [*argv, "--distill_from", full], "distill_weight (none and 1.0)")
        train_script.main([*map(str, argv)])

    def test_a_yaml_file_may_state_it(self, early, tmp_path, fails, drawn):
        about = {"model_params": TINY | {"depth": 3}, "t_min": 15, "diffusion_params": {"num_timesteps": 20}}
        (tmp_path / "net.yaml").write_text(yaml.safe_dump(about))
        train(tmp_path, "--config_path", tmp_path / "net.yaml", steps=1)
        train(tmp_path, "--config_path", tmp_path / "net.yaml", "--t_min", 17, steps=1, name="flag")
        assert min(drawn[:8]) >= 15 and min(drawn[8:]) >= 17
        argv = ["--output_folder", tmp_path / "s", "--config_path", tmp_path / "net.yaml"]
        fails(sampler.main, ["--checkpoint_path", early, *argv], "t_min (8 and 15)")

    def test_a_network_of_all_timesteps_contradicts_one(self, shallow, tmp_path, fails):
        (tmp_path / "net.yaml").write_text(yaml.safe_dump({"model_params": TINY | {"depth": 1}, "t_min": 15}))
        argv = ["--output_folder", tmp_path / "s", "--config_path", tmp_path / "net.yaml"]
        fails(sampler.main, ["--checkpoint_path", shallow, *argv], "t_min (0 and 15)")

    def test_a_run_goes_on_in_its_own(self, early, fails):
        argv = [*FLAGS, "--n_steps", 9, "--log_path", early.parents[1], "--exp_name", "early", "--resume"]
        fails(train_script.main, argv, "t_min (8 and 0)")
        fails(train_script.main, [*argv, "--t_min", 8, "--t_max", 18], "t_max (19 and 18)")

    @pytest.mark.parametrize("flags", [["--t_min", 20], ["--t_max", 20], ["--t_min", 9, "--t_max", 8]])
    def test_a_bad_one(self, flags, tmp_path, fails):
        argv = [*FLAGS, "--n_steps", 1, "--log_path", tmp_path, *flags]
        fails(train_script.main, argv, "t_min=", "wanted 0 <= t_min <= t_max <= 19")
        fails(train_script.main, [*argv, "--t_min", -1], "--t_min", "-1")

    def test_previews_are_made_where_the_network_knows_all_their_timesteps(self, tmp_path, caplog):
        previews = ["--preview_steps", 2, "--n_samples", 2]  # at t = 19 and 9
        part = train(tmp_path, *previews, "--t_min", 10, name="part")
        assert "no previews: the network is trained on t = 10..19" in caplog.text
        assert not list((part / "previews").glob("*"))
        assert list((train(tmp_path, *previews, "--t_min", 9, name="enough") / "previews").glob("*"))

    def test_heads_take_that_of_their_backbone(self, early, tmp_path, fails):
        heads = [*FLAGS, "--n_steps", 1, "--model", "deediff_uvit", "--classifier_type", "attention_probe"]
        heads += ["--load_backbone", early, "--freeze_backbone", "--log_path", tmp_path]
        fails(main_script.main, [*heads, "--t_min", 5], "only on t = 8..19", "at t = 5, 6, 7;")
        main_script.main([*map(str, heads)])
        (path,) = tmp_path.rglob("*_last.pth")
        assert torch.load(path, weights_only=True)["config"]["t_min"] == 8
        argv = ["--checkpoint_path", path, "--threshold", 0.1, "--output_folder", tmp_path / "s", "--n_samples", 1]
        fails(eesampler.main, argv, "only on t = 8..19", "at t = 7, 6, 5, ...;")
        eesampler.main([*map(str, argv), "--allow_outside_range"])


class TestSampling:
    def sample(self, folder, *flags):
        return ["--output_folder", folder, "--n_samples", 1, "--quiet", *flags]

    def test_one_network_outside_its_range(self, early, tmp_path, fails, run_quietly):
        argv = self.sample(tmp_path / "s", "--checkpoint_path", early)
        fails(sampler.main, argv, "only on t = 8..19", "at t = 7, 6, 5, ...;", "--allow_outside_range")
        assert not list((tmp_path / "s").glob("*.png"))
        run_quietly(sampler.main, [*argv, "--solver", "ddim", "--steps", 2])  # t = 19 and 9
        run_quietly(sampler.main, [*argv, "--overwrite", "--allow_outside_range"])

    def test_two_networks(self, early, late, tmp_path, fails, run_quietly):
        argv = self.sample(tmp_path / "s", "--checkpoint_path", early, "--checkpoint_path_late", late, "--overwrite")
        for t_switch in (7, 8, 9):
            run_quietly(sampler.main, [*argv, "--t_switch", t_switch])
        said = fails(sampler.main, [*argv, "--t_switch", 6], "early/digits", "at t = 7;")
        assert "late/" not in said
        fails(sampler.main, [*argv, "--t_switch", 10], "late/digits", "only on t = 0..9", "at t = 10;")
        run_quietly(sampler.main, [*argv, "--t_switch", 11, "--solver", "ddim", "--steps", 2])  # t = 19 and 9


class TestWarmStart:
    def test_all_blocks_are_the_full_network(self, full, tmp_path):
        run = train(tmp_path, "--depth", 5, "--init_from", full, "--lr", 1e-30, steps=1)
        ours, theirs = UViT(**TINY, depth=5), UViT(**TINY, depth=5)
        load_weights(ours, run / LAST)
        load_weights(theirs, full)  # averaged
        assert same(ours.state_dict(), theirs.state_dict())

    def test_a_deeper_network_begins_as_the_shallow_one(self, shallow, tmp_path):
        run = train(tmp_path, "--depth", 5, "--init_from", shallow, "--lr", 1e-30, steps=1)
        depth = torch.load(shallow, weights_only=True)["config"]["model_params"]["depth"]
        ours, theirs = UViT(**TINY, depth=5), UViT(**TINY, depth=depth)
        load_weights(ours, run / LAST)
        load_weights(theirs, shallow)
        x, t = torch.randn(2, *ours.config.image_shape), torch.tensor([0, 9])
        torch.testing.assert_close(ours(x, t), theirs(x, t))

    def test_bare_weights_say_their_depth(self, tmp_path):
        source = perturbed(UViT(**TINY, depth=7))
        torch.save({f"module.{name}": value for name, value in source.state_dict().items()}, tmp_path / "bare.pth")
        flags = ["--model", "uvit", "--init_from", tmp_path / "bare.pth", "--lr", 1e-30]
        run = train(tmp_path, *flags, steps=1, script=main_script)
        assert torch.equal(checkpoint(run)["model"]["mid_block.mlp.fc1.weight"], source.mid_block.mlp.fc1.weight)

    def test_how_to_go_on_leaves_it_out(self, full, tmp_path, capsys):
        train(tmp_path, "--init_from", full, "--max_hours", 1e-9)
        said = capsys.readouterr().err
        assert "continue with: python" in said and "--resume" in said and "--init_from" not in said
        train(tmp_path, "--resume")
        assert checkpoint(tmp_path / "run")["step"] == 4

    def test_what_does_not_fit(self, full, early_exit, tmp_path, fails):
        argv = [*FLAGS, "--n_steps", 1, "--log_path", tmp_path, "--init_from", full]
        fails(train_script.main, [*argv, "--embed_dim", 64], "--init_from", "embed_dim (32 and 64)")
        fails(train_script.main, [*argv, "--resume"], "--init_from starts a new run")
        fails(train_script.main, [*argv, "--load_checkpoint_path", full], "--init_from starts a new run")
        fails(main_script.main, [*argv, "--model", "deediff_uvit"], "--init_from belongs to --model uvit")
        fails(train_script.main, [*FLAGS, "--n_steps", 1, "--init_from", early_exit], "is a deediff_uvit")


class TestDistillation:
    def test_the_loss_and_its_gradient(self):
        uvit, teacher = (perturbed(UViT(**TINY, depth=depth)) for depth in (1, 3))
        teacher.requires_grad_(False).eval()
        x_t, target, t = torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 8), torch.arange(4)
        losses = distillation_objective(teacher, 3.0)(uvit, x_t, t, None, target)
        against = {"target_loss": target, "teacher_loss": teacher(x_t, t)}
        for name, wanted in against.items():
            torch.testing.assert_close(losses[name], (uvit(x_t, t) - wanted).square().mean())
        losses["loss"].backward()
        twin = copy.deepcopy(uvit)
        twin.zero_grad()
        # 1 of the target and 3 of the teacher pull like 4 of their weighted mean.
        (4 * F.mse_loss(twin(x_t, t), (target + 3 * teacher(x_t, t)) / 4)).backward()
        for a, b in zip(uvit.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)

    def test_it_is_logged_and_goes_on_with_the_same_teacher(self, full, shallow, tmp_path, fails):
        flags = ["--distill_from", full, "--distill_weight", 2, "--use_amp", "--lr_schedule", "constant"]
        unbroken = train(tmp_path, *flags, name="unbroken", steps=8)
        broken = train(tmp_path, *flags, name="broken", steps=4)
        moved = tmp_path / "moved.pth"
        moved.write_bytes(full.read_bytes())
        again = [*FLAGS, "--n_steps", 8, "--log_path", tmp_path, "--exp_name", "broken", "--resume", *flags[2:]]
        fails(train_script.main, again, "--distill_weight needs --distill_from")
        fails(train_script.main, [*again, "--distill_from", shallow], "distill_from_sha256")
        fails(
            train_script.main, [*again, "--distill_from", full, "--distill_weight", 1], "distill_weight (2.0 and 1.0)"
        )
        train(tmp_path, "--resume", "--distill_from", moved, *flags[2:], name="broken", steps=8)
        assert same_state(checkpoint(unbroken), checkpoint(broken))
        line = metrics(unbroken)[-1]
        assert line["loss"] == pytest.approx(line["target_loss"] + 2 * line["teacher_loss"], rel=1e-5)
        assert not any("teacher" in name for name in checkpoint(unbroken)["model"])

    def test_sums_begin_anew_in_a_new_run(self, full, tmp_path):
        start = train(tmp_path, name="start", steps=3) / LAST  # three steps of its sums are not logged yet
        flags = ["--load_checkpoint_path", start, "--distill_from", full, "--log_every_n_steps", 4]
        line = metrics(train(tmp_path, *flags, name="taught", steps=4))[0]
        assert line["loss"] == pytest.approx(line["target_loss"] + line["teacher_loss"], rel=1e-5)

    def test_teachers_that_do_not_fit(self, runs, full, early, early_exit, tmp_path, fails):
        argv = [*FLAGS, "--n_steps", 1, "--log_path", tmp_path]
        teacher = [*argv, "--distill_from", full]
        fails(train_script.main, [*teacher, "--num_classes", 10], "num_classes (10 and -1)")
        fails(train_script.main, [*teacher, "--parametrization", "predict_original"], "parametrization (predict_orig")
        fails(train_script.main, [*teacher, "--num_timesteps", 21], "noise schedule")
        fails(train_script.main, [*argv, "--distill_from", early, "--t_min", 7], "only on t = 8..19", "at t = 7;")
        fails(train_script.main, [*argv, "--distill_from", early_exit], "is a deediff_uvit")
        fails(train_script.main, [*argv, "--distill_weight", 1], "--distill_weight needs --distill_from")
        fails(main_script.main, [*teacher, "--model", "deediff_uvit"], "--distill_from belongs to --model uvit")
        assert not list(tmp_path.rglob("*.pth"))

    @pytest.mark.slow
    def test_compiled(self, full, tmp_path, monkeypatch):
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
        torch.compiler.reset()
        flags = ["--distill_from", full, "--log_every_n_steps", 1]
        eager, compiled = (
            metrics(train(tmp_path, *flags, *c, name=f"by{len(c)}", steps=2)) for c in ([], ["--compile"])
        )
        for name in ("loss", "teacher_loss"):
            assert [m[name] for m in eager] == pytest.approx([m[name] for m in compiled], rel=1e-4)

    @pytest.mark.parametrize("more", [[], ["--fsdp"]])
    @pytest.mark.slow
    def test_several_processes_train_as_one(self, more, full, logs):
        flags = [*FLAGS, "--distill_from", full, "--grad_accum_steps", 2, "--log_every_n_steps", 1, "--t_min", 3]
        if not (logs / "alone").exists():
            run(logs, "alone", steps=4, flags=flags)
        several = run(logs, f"several-{len(more)}", *more, steps=4, flags=flags, count=2)
        assert_same_training(several, logs / "alone")


def test_what_is_carried_names_both_ends():
    settings = {"model_params": TINY, "diffusion_params": {"num_timesteps": 20}}
    for given, carried in (({}, (0, 19)), ({"t_min": 1, "t_max": 18}, (1, 18)), ({"t_max": 0}, (0, 0))):
        config = build_config(settings | given, "here")
        assert tuple(carried_settings(config)[name] for name in ("t_min", "t_max")) == carried
