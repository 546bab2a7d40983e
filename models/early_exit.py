"""Early exit on a U-ViT: AdaDiff, first called DeeDiff (Tang et al. 2024, arXiv 2309.17074).

Before each of the L blocks stand a probe, which says how wrong it would be to stop here, and an output
head, which makes the image if one does.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.config import CLASSIFIER_TYPES, check_choice
from models.uvit import UViT, init_linear, patches_to_image


class ExitOutputs(NamedTuple):
    """Everything a full run computes."""

    output: Tensor  # (B, C, H, W), of the whole network
    uncertainty: Tensor  # (L, B), what each probe says
    exit_outputs: Tensor  # (L, B, C, H, W), what each head makes


class EarlyExit(NamedTuple):
    """What a run that leaves early gives."""

    output: Tensor  # (B, C, H, W)
    exit_layer: Tensor  # (B,) int64, blocks run before leaving; L = never left early


class ExitTrace(NamedTuple):
    """An early-exit run with what its probes said on the way."""

    output: Tensor  # (B, C, H, W)
    exit_layer: Tensor  # (B,) int64
    uncertainty: Tensor  # (L, B), nan where an image had left before


class ExitHead(nn.Module):
    """An output head like the network's own."""

    def __init__(self, uvit: UViT):
        super().__init__()
        config = uvit.config
        self.num_extras, self.in_chans = uvit.num_extras, config.in_chans
        self.norm = nn.LayerNorm(config.embed_dim)
        self.decoder_pred = nn.Linear(config.embed_dim, config.patch_size**2 * config.in_chans)
        self.final_layer = nn.Conv2d(config.in_chans, config.in_chans, kernel_size=3, padding=1)
        self.apply(init_linear)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, E + P, D) -> (B, C, H, W)."""
        patches = tokens[:, self.num_extras :]
        return patches_to_image(patches, self.norm, self.decoder_pred, self.final_layer, self.in_chans)


class MlpProbes(nn.Module):
    """Linear probes in one table of weights, indexed by the layer, by each image's own t, or by both.

    An axis the probes do not depend on has length 1.
    """

    def __init__(self, dim: int, num_layers: int, num_timesteps: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_layers, num_timesteps, dim))
        self.bias = nn.Parameter(torch.zeros(num_layers, num_timesteps))
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, tokens: Tensor, layer: int, timesteps: Tensor) -> Tensor:
        """tokens: (B, N, D). timesteps: (B,). Returns (B,) in [0, 1]."""
        num_layers, num_timesteps = self.bias.shape
        layer = layer if num_layers > 1 else 0
        if num_timesteps == 1:
            scores = F.linear(tokens, self.weight[layer], self.bias[layer])[..., 0]
        else:
            t = timesteps.long()
            weight, bias = self.weight[layer, t], self.bias[layer, t]  # (B, D), (B,)
            scores = torch.einsum("bnd,bd->bn", tokens, weight.to(tokens.dtype)) + bias[:, None]
        return scores.sigmoid().mean(dim=1)


class AttentionProbe(nn.Module):
    """One learned query attends to the tokens; an MLP scores what it gathers."""

    def __init__(self, dim: int):
        super().__init__()
        self.q = nn.Parameter(torch.zeros(1, 1, 1, dim))
        self.weight_kv = nn.Linear(dim, 2 * dim)
        self.classification = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, 1))
        self.apply(init_linear)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: (B, N, D), of which the first (class or time) is left out. Returns (B,), unbounded."""
        k, v = self.weight_kv(tokens[:, 1:]).unsqueeze(1).chunk(2, dim=-1)  # (B, 1, N - 1, D) each
        q = self.q.to(k.dtype).expand(len(tokens), -1, -1, -1)
        gathered = F.scaled_dot_product_attention(q, k, v)  # (B, 1, 1, D)
        return self.classification(gathered)[:, 0, 0, 0]


class AttentionProbes(nn.ModuleList):
    def forward(self, tokens: Tensor, layer: int, timesteps: Tensor) -> Tensor:
        return self[layer](tokens)


def make_probes(classifier_type: str, dim: int, num_layers: int, num_timesteps: int) -> nn.Module:
    """A module that is called with (tokens (B, N, D), layer, timesteps (B,)) and returns uncertainty (B,)."""
    check_choice("classifier_type", classifier_type, CLASSIFIER_TYPES)
    if classifier_type == "attention_probe":
        return AttentionProbes(AttentionProbe(dim) for _ in range(num_layers))
    per_layer, per_timestep = "per_layer" in classifier_type, "per_timestep" in classifier_type
    return MlpProbes(dim, num_layers if per_layer else 1, num_timesteps if per_timestep else 1)


class EarlyExitUViT(nn.Module):
    """A U-ViT whose images may stop after any block.

    uvit: the backbone, used as it is. classifier_type: one of CLASSIFIER_TYPES; others raise InputError.
    num_timesteps: T, the length of the tables of per-timestep probes.
    """

    def __init__(self, uvit: UViT, classifier_type: str, num_timesteps: int = 1000):
        super().__init__()
        num_layers = uvit.config.num_blocks
        self.uvit = uvit
        self.classifier_type = classifier_type
        self.probes = make_probes(classifier_type, uvit.config.embed_dim, num_layers, num_timesteps)
        self.exit_heads = nn.ModuleList(ExitHead(uvit) for _ in range(num_layers))

    @property
    def num_layers(self) -> int:
        return len(self.exit_heads)

    def forward(self, x: Tensor, timesteps: Tensor | float, y: Tensor | None = None) -> ExitOutputs:
        """Run everything. x: (B, C, H, W). timesteps: (B,) integers in 0..T-1, or one for all. y: (B,)."""
        timesteps = per_image(timesteps, x)
        uncertainties, exit_outputs, skips = [], [], []
        tokens = self.uvit.embed(x, timesteps, y)
        for layer, head in enumerate(self.exit_heads):
            uncertainties.append(self.probes(tokens, layer, timesteps))
            exit_outputs.append(head(tokens))
            tokens = self.uvit.run_block(layer, tokens, skips)
        return ExitOutputs(self.uvit.decode(tokens), torch.stack(uncertainties), torch.stack(exit_outputs))

    def early_exit(
        self, x: Tensor, timesteps: Tensor | float, y: Tensor | None = None, *, threshold: float
    ) -> EarlyExit:
        """Leave early, image by image: at the first layer whose uncertainty is <= threshold.

        Images that left cost nothing more: the batch shrinks as it goes through the network.
        """
        trace = self.trace_early_exit(x, timesteps, y, threshold=threshold)
        return EarlyExit(trace.output, trace.exit_layer)

    def trace_early_exit(
        self, x: Tensor, timesteps: Tensor | float, y: Tensor | None = None, *, threshold: float
    ) -> ExitTrace:
        """`early_exit` that also tells what the probes said."""
        timesteps = per_image(timesteps, x)
        output = torch.empty_like(x)
        exit_layer = torch.full((len(x),), self.num_layers, device=x.device)
        uncertainties = torch.full((self.num_layers, len(x)), torch.nan, device=x.device)

        rows = torch.arange(len(x), device=x.device)  # the images still in the network
        tokens, skips = self.uvit.embed(x, timesteps, y), []
        for layer, head in enumerate(self.exit_heads):
            uncertainty = self.probes(tokens, layer, timesteps)
            uncertainties[layer, rows] = uncertainty.to(uncertainties.dtype)
            leaves = uncertainty <= threshold
            if leaves.any():
                output[rows[leaves]] = head(tokens[leaves]).to(output.dtype)
                exit_layer[rows[leaves]] = layer
                stays = ~leaves
                rows, timesteps, tokens = rows[stays], timesteps[stays], tokens[stays]
                skips = [skip[stays] for skip in skips]
                if not len(rows):
                    return ExitTrace(output, exit_layer, uncertainties)
            tokens = self.uvit.run_block(layer, tokens, skips)
        output[rows] = self.uvit.decode(tokens).to(output.dtype)
        return ExitTrace(output, exit_layer, uncertainties)


def per_image(timesteps: Tensor | float, x: Tensor) -> Tensor:
    """(B,) timesteps from one number, or as they are."""
    return timesteps if isinstance(timesteps, Tensor) else torch.full((len(x),), timesteps, device=x.device)
