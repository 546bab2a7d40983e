from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL

import models.autoencoder
from common.errors import InputError
from models.autoencoder import load_autoencoder

# The public file's architecture, narrow.
NARROW = models.autoencoder.ARCHITECTURE | {"block_out_channels": (32, 32, 32, 32), "sample_size": 32}


@pytest.fixture
def network(monkeypatch):
    monkeypatch.setattr(models.autoencoder, "ARCHITECTURE", NARROW)
    return AutoencoderKL(**NARROW).eval()


def public_names(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """From diffusers' names to those of the latent diffusion code, written out."""
    renamed = {}
    for key, value in weights.items():
        parts = key.split(".")
        if parts[1:2] == ["down_blocks"]:
            kind = {"resnets": f"block.{parts[4]}", "downsamplers": "downsample"}[parts[3]]
            parts[1:5] = ["down", parts[2], kind]
        elif parts[1:2] == ["up_blocks"]:
            level = str(3 - int(parts[2]))
            kind = {"resnets": f"block.{parts[4]}", "upsamplers": "upsample"}[parts[3]]
            parts[1:5] = ["up", level, kind]
        elif parts[1:2] == ["mid_block"]:
            kind = f"block_{int(parts[3]) + 1}" if parts[2] == "resnets" else "attn_1"
            parts[1:4] = ["mid", kind]
        name = ".".join(parts)
        for ours, theirs in (
            ("conv_shortcut", "nin_shortcut"),
            ("conv_norm_out", "norm_out"),
            ("group_norm", "norm"),
            ("to_q", "q"),
            ("to_k", "k"),
            ("to_v", "v"),
            ("to_out.0", "proj_out"),
        ):
            name = name.replace(ours, theirs)
        if ".attn_1." in name and value.ndim == 2:
            value = value[:, :, None, None]  # attention as 1 x 1 convolutions
        renamed[name] = value
    return renamed


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
