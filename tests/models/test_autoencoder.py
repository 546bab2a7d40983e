from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL

import models.autoencoder
from common.errors import InputError
from models.autoencoder import load_autoencoder
from tests.latents import NARROW, public_names


@pytest.fixture
def network(monkeypatch):
    monkeypatch.setattr(models.autoencoder, "ARCHITECTURE", NARROW)
    return AutoencoderKL(**NARROW).eval()


def test_the_public_layout_loads_and_is_diffusers_own(network, tmp_path):
    path = tmp_path / "autoencoder_kl.pth"
    torch.save(public_names(network.state_dict()), path)
    ours = load_autoencoder(path, 0.18215)
    images = torch.rand(10, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        want = network.encode(images).latent_dist
        mean, std = ours.encode(images)
        assert torch.equal(mean, want.mean) and torch.equal(std, want.std)
        latents = torch.randn(8, 4, 4, 4)
        assert torch.equal(ours.decode(latents), network.decode(latents / 0.18215).sample)
    assert ours.downsampling == 8
    assert ours.decode(torch.randn(10, 4, 4, 4)).shape == (10, 3, 32, 32)


def test_a_folder_of_diffusers_loads(network, tmp_path):
    network.save_pretrained(tmp_path / "vae")
    ours = load_autoencoder(tmp_path / "vae", 1.0)
    latents = torch.randn(2, 4, 4, 4)
    with torch.no_grad():
        assert torch.equal(ours.decode(latents), network.decode(latents).sample)


def test_what_is_missing_is_named(network, tmp_path):
    weights = public_names(network.state_dict())
    torch.save({k: v for k, v in weights.items() if k != "decoder.conv_in.bias"}, tmp_path / "cut.pth")
    with pytest.raises(InputError, match=r"cut\.pth: 1 weights .*decoder\.conv_in\.bias"):
        load_autoencoder(tmp_path / "cut.pth", 1.0)
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match=r"other\.pth"):
        load_autoencoder(tmp_path / "other.pth", 1.0)
    with pytest.raises(InputError, match=r"config\.json"):
        load_autoencoder(tmp_path, 1.0)
    network.save_pretrained(tmp_path / "vae")
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"cut")
    with pytest.raises(InputError, match="vae"):
        load_autoencoder(tmp_path / "vae", 1.0)
