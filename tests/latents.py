"""A small ImageNet, and autoencoders for it: the public file, narrow, and one whose latents are of the right scale."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

from common.images import from_uint8
from data import open_dataset
from models.autoencoder import ARCHITECTURE

# The public file's architecture, narrow.
NARROW = ARCHITECTURE | {"block_out_channels": (32, 32, 32, 32), "sample_size": 32}


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


def tiny_imagenet(folder: Path, count: int, size: tuple[int, int]) -> None:
    """The first and the last of the 1000 classes, with as many images of noise each. size: width and height."""
    for synset in ("n01440764", "n15075141"):
        (folder / synset).mkdir(parents=True)
        for n in range(count):
            pixels = np.random.default_rng(n).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / synset / f"{n}.JPEG")


def scaled_autoencoder(root: Path, img_size: int) -> tuple[AutoencoderKL, float]:
    """A narrow autoencoder, saved as root/vae, and the scale by which latents of root's ImageNet have a std of 1."""
    torch.manual_seed(0)
    network = AutoencoderKL(**NARROW).eval()
    network.save_pretrained(root / "vae")
    source = open_dataset("imagenet256", root, img_size=img_size, in_chans=3, packed=False)
    with torch.no_grad():
        latents = network.encode(from_uint8(source.__getitems__(range(len(source)))[0])).latent_dist.mean
    return network, 1 / latents.std().item()
