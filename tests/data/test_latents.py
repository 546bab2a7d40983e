"""ImageNet 256 as latents of a narrow random autoencoder: pack, train, sample."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import pack
import sampler
import train as train_script
from common.images import from_uint8
from data import open_dataset
from data.dataset import InMemoryDataset
from data.packing import work as packing
from data.packing.latents import LatentSource, PackedLatents
from data.packing.packed import read_manifest
from models.autoencoder import load_autoencoder
from tests.latents import scaled_autoencoder, tiny_imagenet

SIZE = 32  # of the images; 4 x 4 latents


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two classes of four images, and an autoencoder whose scaled latents have a standard deviation of 1."""
    root = tmp_path_factory.mktemp("latents")
    tiny_imagenet(root / "imagenet", 4, (48, 40))
    return root, *scaled_autoencoder(root, SIZE)


def pack_flags(root, scale):
    return [
        *("--dataset", "imagenet256", "--data_path", str(root), "--img_size", str(SIZE), "--quiet", "--device", "cpu"),
        *("--autoencoder_checkpoint_path", str(root / "vae"), "--scale_factor", str(scale)),
    ]


@pytest.fixture(scope="module")
def packed(place):
    root, _, scale = place
    pack.main(pack_flags(root, scale))
    return root


def test_rows_are_mean_and_standard_deviation_of_image_and_mirror_image(packed, place):
    root, network, scale = place
    latents = open_dataset("imagenet256", root, img_size=4, in_chans=4, num_classes=1001)
    rows, labels = latents.__getitems__(range(8))
    assert rows.shape == (8, 2, 2, 4, 4, 4) and rows.dtype == torch.float16
    assert labels.tolist() == [0] * 4 + [999] * 4
    images = from_uint8(
        open_dataset("imagenet256", root, img_size=SIZE, in_chans=3, packed=False).__getitems__(range(8))[0]
    )
    with torch.no_grad():
        for view, pixels in enumerate((images, images.flip(-1))):
            want = network.encode(pixels).latent_dist
            torch.testing.assert_close(rows[:, view, 0].float(), want.mean, rtol=2e-3, atol=2e-3)
            torch.testing.assert_close(rows[:, view, 1].float(), want.std, rtol=2e-3, atol=2e-3)
    assert latents.scale_factor == pytest.approx(scale)


class Held(InMemoryDataset):
    """Images that are no files, as those of CIFAR-10."""

    images = torch.randint(0, 256, (3, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(3)

    def describe(self):
        return {"dataset": "held", "source": "memory", "img_size": SIZE, "in_chans": 3, "crop": "none"}


def test_images_without_files_become_latents_too(place, tmp_path):
    root, network, scale = place
    source = LatentSource(Held(), load_autoencoder(root / "vae", scale), root / "vae", torch.device("cpu"))
    packing.pack(source, tmp_path / "packed")
    latents = PackedLatents(tmp_path / "packed", read_manifest(tmp_path / "packed"))
    rows, labels = latents.__getitems__([2, 0])
    assert labels.tolist() == [2, 0] and source.name_of(1) == "1"
    with torch.no_grad():
        want = network.encode(from_uint8(Held.images[[2, 0]])).latent_dist.mean
    torch.testing.assert_close(rows[:, 0, 0].float(), want, rtol=2e-3, atol=2e-3)


def test_training_draws_fresh_scaled_latents(packed, place):
    root, _, scale = place
    latents = open_dataset("imagenet256", root, img_size=4, in_chans=4)
    rows = latents.__getitems__(range(8))[0]
    generator = torch.Generator().manual_seed(0)
    mirrored = torch.tensor([True, False] * 4)

    def normal(*shape):
        return torch.randn(8, *shape, generator=generator)

    draws = torch.stack([latents.to_x0(rows, mirrored, normal) for _ in range(400)])
    chosen = rows[torch.arange(8), mirrored.long()].float()
    torch.testing.assert_close(
        draws.mean(0), chosen[:, 0] * scale, rtol=0, atol=0.3 * scale * chosen[:, 1].max().item()
    )
    torch.testing.assert_close(draws.std(0), chosen[:, 1] * scale, rtol=0.25, atol=0.01)


def test_train_and_sample(packed, place, tmp_path, capsys, fails):
    root, _, scale = place
    params = {"img_size": 4, "patch_size": 2, "in_chans": 4, "embed_dim": 32, "num_heads": 4, "depth": 1}
    settings = {"model_params": params | {"num_classes": 1001}, "dataset": "imagenet256"}
    config = tmp_path / "net.yaml"
    config.write_text(yaml.safe_dump(settings | {"diffusion_params": {"num_timesteps": 10}}))
    argv = ["--config_path", config, "--dataset", "imagenet256", "--data_path", root, "--n_steps", 2, "--quiet"]
    argv += ["--batch_size", 4, "--log_path", tmp_path, "--n_samples", 2, "--preview_steps", 2, "--device", "cpu"]
    argv += ["--label_dropout", 0.5, "--autoencoder_checkpoint_path", root / "vae"]
    train_script.main([str(arg) for arg in argv])
    run = tmp_path / "imagenet256_uvit_1"
    assert Image.open(run / "previews" / "step-2.png").size == (2 * 66, 66)
    carried = torch.load(run / "imagenet256_uvit_last.pth", weights_only=True)["config"]
    assert carried["autoencoder"] == {"scale_factor": pytest.approx(scale)}
    assert carried["real_classes"] == 1000

    argv = ["--checkpoint_path", run / "imagenet256_uvit_last.pth", "--n_samples", 3, "--quiet", "--device", "cpu"]
    argv += ["--guidance_scale", 0.4, "--output_folder", tmp_path / "s"]
    fails(sampler.main, argv, "--autoencoder_checkpoint_path")
    sampler.main([str(arg) for arg in [*argv, "--autoencoder_checkpoint_path", root / "vae"]])
    assert np.array(Image.open(tmp_path / "s" / "000002.png")).shape == (SIZE, SIZE, 3)
    fails(sampler.main, [*argv, "--overwrite", "--autoencoder_checkpoint_path", root / "vae", "--clip_x0"], "latents")


@pytest.mark.parametrize("factor", [20, 0.1])
def test_a_wrong_scale_is_found_after_the_first_chunk(factor, place, tmp_path, fails, monkeypatch):
    """Nothing is left in the way of the right one."""
    root, _, scale = place
    monkeypatch.setattr(packing, "CHUNK_IMAGES", 2)
    encoded, encode = [], LatentSource._encode
    monkeypatch.setattr(LatentSource, "_encode", lambda self, pixels: encoded.extend(pixels) or encode(self, pixels))
    argv = [*pack_flags(root, factor * scale), "--output", tmp_path / "wrong"]
    fails(pack.main, argv, "standard deviation of the latents", "--scale_factor")
    assert len(encoded) == 1 + 2 and not list(tmp_path.iterdir())  # one for the shape, and the first chunk


def test_a_first_chunk_of_broken_images_says_nothing_of_the_scale(place, tmp_path, monkeypatch):
    root, _, scale = place
    shutil.copytree(root / "imagenet", tmp_path / "imagenet")
    for n in range(2):
        path = tmp_path / "imagenet" / "n01440764" / f"{n}.JPEG"
        path.write_bytes(path.read_bytes()[:300])
    monkeypatch.setattr(packing, "CHUNK_IMAGES", 2)
    pack.main([*pack_flags(root, scale), "--data_path", str(tmp_path), "--output", str(tmp_path / "p")])
    assert len(json.loads((tmp_path / "p" / "manifest.json").read_text())["left_out"]) == 2


def test_unscaled_latents_are_refused(packed, place, tmp_path, fails):
    """Of a packed dataset whose manifest says another scale."""
    scale = place[2]
    (there,) = (packed / "packed").iterdir()
    shutil.copytree(there, tmp_path / "wrong")
    manifest = json.loads((there / "manifest.json").read_text())
    manifest["source"]["scale_factor"] = 20 * scale
    (tmp_path / "wrong" / "manifest.json").write_text(json.dumps(manifest))
    config = tmp_path / "net.yaml"
    params = {"img_size": 4, "patch_size": 2, "in_chans": 4, "embed_dim": 32, "num_heads": 4, "depth": 1}
    config.write_text(yaml.safe_dump({"model_params": params}))
    argv = ["--config_path", config, "--dataset", "imagenet256", "--n_steps", 2, "--batch_size", 4, "--quiet"]
    argv += ["--log_path", tmp_path, "--data_path", tmp_path / "wrong"]
    fails(train_script.main, argv, "standard deviation", "--scale_factor")


def test_another_scale_than_the_network_says_is_refused(packed, place, tmp_path, fails):
    root, _, _ = place
    params = {"img_size": 4, "patch_size": 2, "in_chans": 4, "embed_dim": 32, "num_heads": 4, "depth": 1}
    config = tmp_path / "net.yaml"
    config.write_text(yaml.safe_dump({"model_params": params, "autoencoder": {"scale_factor": 0.18215}}))
    argv = ["--config_path", config, "--dataset", "imagenet256", "--data_path", root, "--n_steps", 2, "--quiet"]
    fails(train_script.main, [*argv, "--batch_size", 4, "--log_path", tmp_path], "scale_factor", "0.18215")


def test_the_manifest_says_what_the_latents_are_of(packed, place):
    (manifest,) = (packed / "packed").glob("*/manifest.json")
    about = json.loads(manifest.read_text())
    assert about["kind"] == "latents" and about["source"]["pixels"] == SIZE
    assert len(about["source"]["autoencoder_sha256"]) == 64


def test_without_packing_latents_are_not_there(place, tmp_path, fails):
    root, _, _ = place
    (tmp_path / "imagenet").symlink_to(root / "imagenet")
    params = {"img_size": 4, "patch_size": 2, "in_chans": 4, "embed_dim": 32, "num_heads": 4, "depth": 1}
    config = tmp_path / "net.yaml"
    config.write_text(yaml.safe_dump({"model_params": params}))
    argv = ["--config_path", config, "--dataset", "imagenet256", "--data_path", tmp_path, "--n_steps", 2, "--quiet"]
    fails(train_script.main, [*argv, "--batch_size", 4, "--log_path", tmp_path / "l"], "in_chans=4", "pack.py")
