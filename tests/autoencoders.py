"""The public autoencoder file, narrow."""

from __future__ import annotations

import torch

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
