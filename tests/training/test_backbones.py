"""A DiT is described, trained, taught and sampled from like a U-ViT."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

import benchmark as benchmark_script
import calibrate as calibrate_script
import eesampler as eesampler_script
import main as main_script
import sampler as sampler_script
import train as train_script
from common.config import Config, DiffusionConfig, DiTConfig, UViTConfig, build_config
from common.errors import InputError
from models import DiT
from models.weights import read_pth
from training import previews
from training.settings import LogSettings

SHAPE = {"input_size": 8, "in_channels": 1, "patch_size": 4, "hidden_size": 32, "num_heads": 4, "num_classes": 10}
DIT = [text for name, value in SHAPE.items() for text in (f"--{name}", str(value))]
TRAINING = [
    *("--dataset", "digits", "--batch_size", "8", "--num_timesteps", "20", "--num_warmup_steps", "2", "--n_steps", "4"),
    *("--log_every_n_steps", "4", "--preview_steps", "0", "--device", "cpu", "--quiet"),
]


@pytest.fixture(scope="module")
def dits(tmp_path_factory):
    """A DiT of 4 blocks, and one of 2 that learned from it."""
    logs = tmp_path_factory.mktemp("dits")
    flags = [*DIT, *TRAINING, "--model", "dit", "--log_path", str(logs)]
    train_script.main([*flags, "--depth", "4", "--exp_name", "full"])
    full = logs / "full" / "digits_dit_last.pth"
    main_script.main([*flags, "--depth", "2", "--exp_name", "shallow", "--distill_from", str(full)])
    return logs / "shallow" / "digits_dit_last.pth", full


def pair(dits, tmp_path):
    shallow, full = dits
    return [
        *("--checkpoint_path", shallow, "--checkpoint_path_late", full, "--n_samples", 3),
        *("--output_folder", tmp_path / "out", "--device", "cpu", "--quiet"),
    ]


def test_it_carries_its_description(dits):
    config = read_pth(dits[1])["config"]
    assert (config["model"], config["model_params"]["hidden_size"], config["model_params"]["depth"]) == ("dit", 32, 4)
    assert config["real_classes"] == 10
    assert read_pth(dits[1])["options"]["label_dropout"] == 0.1, "what the network is made for"


def test_two_of_them_share_the_sampling(dits, tmp_path):
    sampler_script.main([str(word) for word in [*pair(dits, tmp_path), "--t_switch", 9, "--guidance_scale", 1]])
    about = json.loads((tmp_path / "out" / "report" / "statistics.json").read_text())
    assert [(b["model"], b["timesteps"]) for b in about["backbones"]] == [("dit", 10), ("dit", 10)]
    assert about["backbones"][0]["flops_per_image"] < about["backbones"][1]["flops_per_image"]


def test_a_shallow_one_for_its_own_timesteps(dits, tmp_path, run_quietly, fails):
    """Trained by main.py on the upper half alone, beside the full one and from its predictions."""
    flags = [*DIT, *TRAINING, "--model", "dit", "--depth", 1, "--t_min", 10, "--log_path", tmp_path]
    run_quietly(main_script.main, [*flags, "--exp_name", "upper", "--distill_from", dits[1], "--distill_weight", 0.5])
    upper = tmp_path / "upper" / "digits_dit_last.pth"
    config = read_pth(upper)["config"]
    assert (config["t_min"], config["t_max"], config["model_params"]["depth"]) == (10, 19, 1)
    logged = [json.loads(line) for line in (tmp_path / "upper" / "metrics.jsonl").read_text().splitlines()]
    assert {"target_loss", "teacher_loss"} <= logged[-1].keys()
    argv = pair((upper, dits[1]), tmp_path)
    fails(sampler_script.main, [*argv, "--t_switch", 8], "trained only on t = 10..19", "t = 9")
    run_quietly(sampler_script.main, [*argv, "--t_switch", 9])
    assert len(list((tmp_path / "out").glob("*.png"))) == 3
    teacher = ["--t_min", 5, "--exp_name", "lower", "--distill_from", upper]
    fails(main_script.main, [*flags, *teacher], "it cannot teach these timesteps")


def test_a_shallow_one_beside_bare_weights(tmp_path, run_quietly):
    """As of the public files: of the teacher's depth, no description says anything."""
    torch.manual_seed(1)
    save_file(DiT(**SHAPE, depth=3, learn_sigma=True).state_dict(), tmp_path / "dit.safetensors")
    flags = [*DIT, *TRAINING, "--model", "dit", "--depth", 1, "--log_path", tmp_path, "--exp_name", "shallow"]
    run_quietly(main_script.main, [*flags, "--distill_from", tmp_path / "dit.safetensors"])
    assert read_pth(tmp_path / "shallow" / "digits_dit_last.pth")["config"]["model_params"]["depth"] == 1


def test_no_blocks_of_another_dit_to_begin_with(dits, tmp_path, fails):
    flags = [*DIT, *TRAINING, "--model", "dit", "--depth", 2, "--log_path", tmp_path, "--init_from", dits[1]]
    fails(main_script.main, flags, "--init_from", "model uvit")
    assert not list(tmp_path.iterdir())


def test_cached_calibrated_and_timed(dits, tmp_path, run_quietly):
    run_quietly(sampler_script.main, [*pair(dits, tmp_path), "--t_switch", 9, "--reuse_every", 2])
    files = ["--checkpoint_path", *dits, "--dataset", "digits", "--n_images", 8, "--batch_size", 8]
    said = run_quietly(calibrate_script.main, [*files, "--output", tmp_path / "c.yaml", "--device", "cpu", "--quiet"])
    assert "chosen: t_switch" in said
    few = ["--rounds", 1, "--batch_size", 2, "--solver", "ddim", "--steps", 2, "--t_switch", 9]
    few += ["--full", dits[1], "--shallow", dits[0], "--output_folder", tmp_path / "b", "--device", "cpu", "--quiet"]
    assert "ddim" in run_quietly(benchmark_script.main, ["sample", *few])


def test_one_with_a_uvit_of_the_same_labels(dits, runs, tmp_path, run_quietly, fails):
    """10 classes and one for none, which a U-ViT counts and a DiT does not."""
    uvit = runs / "no_class" / "digits_uvit_last.pth"
    argv = pair((uvit, dits[1]), tmp_path)
    run_quietly(sampler_script.main, [*argv, "--t_switch", 9, "--guidance_scale", 0.5])
    other = pair((runs / "classes" / "digits_uvit_last.pth", dits[1]), tmp_path)
    fails(sampler_script.main, [*other, "--t_switch", 9], "num_classes (10 and 11)")


def test_from_bare_weights_and_a_yaml_file(tmp_path, run_quietly):
    torch.manual_seed(1)
    save_file(DiT(**SHAPE, depth=1).state_dict(), tmp_path / "dit.safetensors")
    described = {"model": "dit", "model_params": {**SHAPE, "depth": 1}, "diffusion_params": {"num_timesteps": 20}}
    (tmp_path / "dit.yaml").write_text(yaml.safe_dump(described))
    argv = ["--checkpoint_path", tmp_path / "dit.safetensors", "--config_path", tmp_path / "dit.yaml"]
    argv += ["--n_samples", 2, "--output_folder", tmp_path / "out", "--device", "cpu", "--quiet"]
    run_quietly(sampler_script.main, argv)
    assert len(list((tmp_path / "out").glob("*.png"))) == 2
    # Training takes the kind of network from there too.
    train = [*TRAINING, "--config_path", tmp_path / "dit.yaml", "--log_path", tmp_path, "--n_steps", 1]
    run_quietly(train_script.main, train)
    assert (tmp_path / "digits_dit_1" / "digits_dit_last.pth").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--embed_dim", 32], ["embed_dim", "model uvit"]),
        (["--no-conv", "--qkv_bias"], ["qkv_bias", "conv"]),
        (["--init_from", "FULL"], ["--init_from", "uvit"]),
        (["--freeze_backbone"], ["--freeze_backbone"]),
        (["--num_heads", 5], ["num_heads=5"]),
    ],
)
def test_flags_of_a_uvit_are_none_of_a_dit(flags, words, dits, tmp_path, fails):
    flags = [dits[1] if flag == "FULL" else flag for flag in flags]
    fails(train_script.main, [*DIT, *TRAINING, "--model", "dit", "--log_path", tmp_path, *flags], *words)


def test_flags_of_a_dit_are_none_of_a_uvit(dits, runs, full, tmp_path, fails):
    uvit = ["--img_size", 8, "--in_chans", 1, "--patch_size", 4, "--embed_dim", 32, *TRAINING, "--log_path", tmp_path]
    fails(train_script.main, [*uvit, "--hidden_size", 32], "hidden_size", "dit")
    fails(train_script.main, [*uvit, "--init_from", dits[1]], "--init_from", "uvit")
    fails(train_script.main, [*uvit, "--distill_from", dits[1]], "--distill_from", "num_classes")
    argv = ["--checkpoint_path", dits[1], "--output_folder", tmp_path / "out", "--device", "cpu"]
    fails(sampler_script.main, [*argv, "--embed_dim", 32], "embed_dim", "uvit")
    fails(sampler_script.main, [*argv, "--depth", 3], "model_params.depth (4 and 3)")


def test_early_exit_is_for_uvits(dits, tmp_path, fails):
    argv = ["--checkpoint_path", dits[1], "--output_folder", tmp_path / "out", "--threshold", 0.1, "--device", "cpu"]
    fails(eesampler_script.main, argv, "is a dit", "sampler.py")
    flags = [*TRAINING, "--model", "deediff_uvit", "--classifier_type", "mlp_probe_per_layer", "--log_path", tmp_path]
    fails(main_script.main, [*flags, "--load_backbone", dits[1]], "is a dit", "wanted a uvit")


def test_a_model_that_contradicts_the_file(tmp_path, fails):
    (tmp_path / "dit.yaml").write_text(yaml.safe_dump({"model": "dit", "model_params": SHAPE}))
    argv = [*TRAINING, "--model", "uvit", "--config_path", tmp_path / "dit.yaml", "--log_path", tmp_path]
    fails(train_script.main, argv, "--model uvit contradicts model dit")
    early_exit = {"model": "deediff_uvit", "classifier_type": "mlp_probe_per_layer", "model_params": {"img_size": 8}}
    (tmp_path / "dit.yaml").write_text(yaml.safe_dump(early_exit))
    fails(train_script.main, [*TRAINING, *argv[-4:]], "describes a deediff_uvit; train.py trains uvit or dit")
    (tmp_path / "dit.yaml").write_text(yaml.safe_dump({"model": "dti", "model_params": SHAPE}))
    fails(train_script.main, [*TRAINING, *argv[-4:]], "model='dti'", "uvit, dit")


def test_classes_of_both_kinds():
    uvit = Config(model_params=UViTConfig(img_size=8, patch_size=4, num_classes=11), real_classes=10)
    dit = Config(model="dit", model_params=DiTConfig(num_classes=10))
    fewer = Config(model="dit", model_params=DiTConfig(num_classes=10), real_classes=3)
    without = Config(model="dit", model_params=DiTConfig(num_classes=10, class_dropout_prob=0))
    got = [(len(c.classes), c.no_class, c.model_params.num_labels) for c in (uvit, dit, fewer, without)]
    assert got == [(10, 10, 11), (10, 10, 11), (3, 10, 11), (10, None, 10)]


def test_a_flow_network_predicts_its_velocity():
    given = {"model": "dit", "model_params": {}, "diffusion_params": {"toward_data": True}}
    for parametrization in ("predict_noise", "predict_v"):
        with pytest.raises(InputError, match=f"f.yaml: parametrization={parametrization}: a flow network"):
            build_config(given | {"parametrization": parametrization}, "f.yaml")
    assert build_config(given | {"parametrization": "predict_velocity"}, "f.yaml").diffusion_params.toward_data


@pytest.mark.parametrize("toward_data", [False, True])
def test_previews_of_velocities(toward_data, tmp_path, monkeypatch):
    """The perfect network of data that are 0.3 everywhere: its previews are that, a level of 166."""
    T = 20
    config = Config(
        model_params=UViTConfig(img_size=4, patch_size=2),
        parametrization="predict_velocity",
        diffusion_params=DiffusionConfig(
            num_timesteps=T, beta_schedule="rectified_flow", time_shift=0.5, toward_data=toward_data
        ),
    )

    def perfect(x, t, y):
        velocity = (x - 0.3) / ((t + 0.5) / T)
        return -velocity if toward_data else velocity

    grids = []
    monkeypatch.setattr(previews, "save_grid", lambda path, images, n: grids.append(images))
    learner = SimpleNamespace(device=torch.device("cpu"), ema=None, network=torch.nn.Identity())
    settings = LogSettings(n_samples=2, preview_steps=10)
    previews.preview_maker(settings, config, learner, perfect, tmp_path, fsdp=False)(1)
    np.testing.assert_array_equal(grids[0].numpy(), 166)
