"""Where to switch between two networks of latents, for someone who has the images and the autoencoder."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import yaml

import calibrate
import pack
import sampler
from models import UViT
from tests.latents import scaled_autoencoder, tiny_imagenet

SIZE = 32  # of the images; 4 x 4 latents
SHAPE = {"img_size": 4, "patch_size": 2, "in_chans": 4, "embed_dim": 32, "num_heads": 4, "num_classes": 1001}
QUICK = ["--steps", 4, "--batch_size", 4, "--n_images", 6, "--speedup", 1, "--device", "cpu", "--quiet"]


@pytest.fixture
def place(tmp_path):
    """Images, their autoencoder, and two networks under bare names whose description says where it is."""
    tiny_imagenet(tmp_path / "imagenet", 4, (48, 40))
    _, scale = scaled_autoencoder(tmp_path, SIZE)
    for name, depth in (("small", 1), ("large", 3)):
        torch.save(UViT(**SHAPE, depth=depth).state_dict(), tmp_path / f"{name}.pth")
        described = {
            "model_params": SHAPE | {"depth": depth},
            "real_classes": 1000,
            "diffusion_params": {"beta_schedule": "linear" if name == "small" else "scaled_linear"},
            "autoencoder": {"checkpoint_path": str(tmp_path / "vae"), "scale_factor": scale},
        }
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(described))
    return tmp_path


def argv_of(place, *flags):
    files = [[place / f"{name}.{suffix}" for name in ("small", "large")] for suffix in ("pth", "yaml")]
    data = ["--dataset", "imagenet256", "--data_path", place]
    return ["--checkpoint_path", *files[0], "--config_path", *files[1], *data, *QUICK, *flags]


def errors(path):
    return [network["error"]["mean"] for network in json.loads(path.read_text())["networks"]]


def with_scale(place, scale):
    for name in ("small", "large"):
        described = yaml.safe_load((place / f"{name}.yaml").read_text())
        described["autoencoder"]["scale_factor"] = scale
        (place / f"{name}.yaml").write_text(yaml.safe_dump(described))


def test_images_are_encoded_as_if_they_had_been_packed(place, run_quietly, fails):
    scale = yaml.safe_load((place / "large.yaml").read_text())["autoencoder"]["scale_factor"]
    run_quietly(calibrate.main, argv_of(place, "--output", place / "a.yaml", "--guidance_scale", 0.4))
    packing = ["--dataset", "imagenet256", "--data_path", place, "--img_size", SIZE, "--quiet", "--device", "cpu"]
    packing += ["--autoencoder_checkpoint_path", place / "vae", "--scale_factor", scale]
    run_quietly(pack.main, packing)
    (place / "vae").rename(place / "gone")
    run_quietly(calibrate.main, argv_of(place, "--output", place / "b.yaml", "--guidance_scale", 0.4))
    np.testing.assert_allclose(errors(place / "a.json"), errors(place / "b.json"), rtol=1e-5)
    with_scale(place, 2 * scale)
    fails(calibrate.main, argv_of(place, "--output", place / "c.yaml"), "packed with scale_factor", str(2 * scale))


def test_the_autoencoder_may_lie_elsewhere(place, run_quietly, fails):
    (place / "vae").rename(place / "elsewhere")
    argv = argv_of(place, "--output", place / "a.yaml")
    fails(calibrate.main, argv, "no such autoencoder", "--autoencoder_checkpoint_path")
    run_quietly(calibrate.main, [*argv, "--autoencoder_checkpoint_path", place / "elsewhere"])
    files = ["--checkpoint_path", place / "small.pth", "--config_path", place / "small.yaml"]
    files += ["--checkpoint_path_late", place / "large.pth", "--config_path_late", place / "large.yaml"]
    auto = [*files, "--t_switch", "auto", "--dataset", "imagenet256", "--data_path", place, *QUICK]
    auto += ["--n_samples", 2, "--output_folder", place / "out"]
    said = run_quietly(sampler.main, [*auto, "--autoencoder_checkpoint_path", place / "elsewhere"])
    assert "chosen: t_switch" in said


def test_what_is_missing_is_named(place, tmp_path, fails):
    argv = argv_of(place, "--output", place / "a.yaml")
    for name in ("small", "large"):
        described = yaml.safe_load((place / f"{name}.yaml").read_text())
        del described["autoencoder"]["checkpoint_path"]
        (place / f"{name}.yaml").write_text(yaml.safe_dump(described))
    fails(calibrate.main, argv, "the networks make latents", "--autoencoder_checkpoint_path", "pack.py")
    (place / "empty").mkdir()
    argv[argv.index("--data_path") + 1] = place / "empty"
    autoencoder = ["--autoencoder_checkpoint_path", place / "vae"]
    fails(calibrate.main, [*argv, *autoencoder], "imagenet256 is not in", "ILSVRC 2012")
    fails(calibrate.main, [*argv, *autoencoder, "--verify", 2], "imagenet256 is not in", "ILSVRC 2012")
    assert not list(place.glob("a.*"))
