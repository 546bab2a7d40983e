"""Early exit on a U-ViT: AdaDiff, first called DeeDiff (Tang et al. 2024, arXiv 2309.17074).

Before each of the L blocks stand a probe, which says how wrong it would be to stop here, and an output
head, which makes the image if one does.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.config import CLASSIFIER_TYPES, check_choice
from models.backbone import per_image
from models.uvit import UViT, final_convolution, init_linear, patches_to_image


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
        self.final_layer = final_convolution(config)
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

    def forward(self, tokens: Tensor, layer: int, timesteps: Tensor | float) -> Tensor:
        """tokens: (B, N, D). timesteps: (B,), or one for all. Returns (B,) in [0, 1]."""
        num_layers, num_timesteps = self.bias.shape
        layer = layer if num_layers > 1 else 0
        if num_timesteps == 1 or not isinstance(timesteps, Tensor):
            t = int(timesteps) if num_timesteps > 1 else 0
            scores = F.linear(tokens, self.weight[layer, t, None], self.bias[layer, t, None])[..., 0]
        else:
            at = timesteps.long()
            weight, bias = self.weight[layer, at], self.bias[layer, at]  # (B, D), (B,)
            scores = torch.einsum("bnd,bd->bn", tokens, weight.to(tokens.dtype)) + bias[:, None]
        return scores.float().sigmoid().mean(dim=1)  # the mean of many small numbers: not in half precision


class AttentionProbe(nn.Module):
    """One learned query attends to the tokens; an MLP scores what it gathers.

    With one query the keys and values need not be made: q . (W_k x + b_k) is (W_k' q) . x plus a constant, which
    softmax takes no notice of, and the weighted mean of W_v x + b_v is W_v times the mean of x, plus b_v.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.q = nn.Parameter(torch.zeros(1, 1, 1, dim))
        self.weight_kv = nn.Linear(dim, 2 * dim)
        self.classification = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, 1))
        self.apply(init_linear)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: (B, N, D), of which the first (class or time) is left out. Returns (B,), unbounded."""
        tokens = tokens[:, 1:]
        weight_k, weight_v = self.weight_kv.weight.chunk(2)  # (D, D) each
        query = self.q.flatten() @ weight_k / math.sqrt(len(weight_k))  # (D,)
        attention = (tokens @ query.to(tokens.dtype)).softmax(dim=1)  # (B, N - 1)
        mean = (attention[:, None].to(tokens.dtype) @ tokens)[:, 0]  # (B, D)
        gathered = F.linear(mean, weight_v, self.weight_kv.bias.chunk(2)[1])
        return self.classification(gathered)[:, 0].float()


class AttentionProbes(nn.ModuleList):
    def forward(self, tokens: Tensor, layer: int, timesteps: Tensor | float) -> Tensor:
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
        uncertainties, exit_outputs = [], []
        skips: list[Tensor] = []
        tokens = self.uvit.embed(x, self.uvit.time_tokens(timesteps), y)
        for layer, head in enumerate(self.exit_heads):
            uncertainties.append(self.probes(tokens, layer, timesteps))
            exit_outputs.append(head(tokens))
            tokens = self.uvit.run_block(layer, tokens, skips)
        return ExitOutputs(self.uvit.decode(tokens), torch.stack(uncertainties), torch.stack(exit_outputs))

    def leave_at(self, layer: int, x: Tensor, time: Tensor, y: Tensor | None = None) -> Tensor:
        """All images leave at one layer, 0..L (L: never early), and no probe is asked.

        x, y: as in `forward`. time: `time_tokens` of the timesteps. Returns the output (B, C, H, W).
        """
        tokens = self.uvit.run_blocks(range(layer), self.uvit.embed(x, time, y), [])
        return self.uvit.decode(tokens) if layer == self.num_layers else self.exit_heads[layer](tokens)

    def early_exit(
        self, x: Tensor, timesteps: Tensor | float, y: Tensor | None = None, *, threshold: float
    ) -> EarlyExit:
        """Leave early, image by image: at the first layer whose uncertainty is <= threshold.

        Images that left cost nothing more: the batch shrinks as it goes through the network.
        """
        trace = self.trace_early_exit(x, timesteps, y, threshold=threshold)
        return EarlyExit(trace.output, trace.exit_layer)

    def trace_early_exit(
        self,
        x: Tensor,
        timesteps: Tensor | float,
        y: Tensor | None = None,
        *,
        threshold: float,
        min_group: int = 1,
        time: Tensor | None = None,
    ) -> ExitTrace:
        """`early_exit` that also tells what the probes said.

        min_group: images that left stay in the batch until so many of them wait, which changes the time alone.
        time: `time_tokens` of the timesteps, where they are known already.
        """
        exit_layer = torch.full((len(x),), self.num_layers, device=x.device)
        uncertainties = torch.full((self.num_layers, len(x)), torch.nan, device=x.device)
        output = torch.empty_like(x)

        rows = torch.arange(len(x), device=x.device)  # the images in the batch, rising
        left, num_left = torch.zeros_like(rows, dtype=torch.bool), 0  # those of them that left and wait
        tokens = self.uvit.embed(x, self.uvit.time_tokens(per_image(timesteps, x)) if time is None else time, y)
        skips: list[Tensor] = []
        rows_of_skips: list[Tensor] = []
        for layer, head in enumerate(self.exit_heads):
            uncertainty = self.probes(tokens, layer, timesteps)
            leaves = uncertainty <= threshold
            if num_left:
                leaves &= ~left
                uncertainty = uncertainty.masked_fill(left, torch.nan)
            uncertainties[layer].index_copy_(0, rows, uncertainty)
            num_leaving = int(leaves.sum())  # the only time the host waits for the device
            if num_leaving:
                chosen = first(num_leaving, leaves)
                at = take(rows, chosen)
                output = put(output, at, head(take(tokens, chosen)))
                exit_layer.index_fill_(0, at, layer)
                left, num_left = left | leaves, num_left + num_leaving
                if num_left == len(rows):
                    return ExitTrace(output, exit_layer, uncertainties)
                if num_left >= min_group:
                    stay = first(len(rows) - num_left, ~left)
                    rows, tokens, left, num_left = take(rows, stay), take(tokens, stay), take(left, stay), 0
                    timesteps = take(timesteps, stay) if isinstance(timesteps, Tensor) else timesteps
            if layer > self.num_layers // 2:
                before = rows_of_skips.pop()
                if len(rows) < len(before):  # gathered where it is needed, not where images leave
                    skips[-1] = take(skips[-1], torch.searchsorted(before, rows))
            tokens = self.uvit.run_block(layer, tokens, skips)
            if layer < self.num_layers // 2:
                rows_of_skips.append(rows)
        chosen = first(len(rows) - num_left, ~left)
        output = put(output, take(rows, chosen), self.uvit.decode(take(tokens, chosen)))
        return ExitTrace(output, exit_layer, uncertainties)


def first(count: int, wanted: Tensor) -> Tensor | None:
    """Where `wanted` (B,) is true, rising, (count,); None for everywhere. The host knows the count already."""
    return None if count == len(wanted) else wanted.byte().argsort(stable=True, descending=True)[:count]


def take(tensor: Tensor, indices: Tensor | None) -> Tensor:
    """Those items of a batch; None: all of them, without a copy."""
    return tensor if indices is None else tensor.index_select(0, indices)


def put(batch: Tensor, indices: Tensor, items: Tensor) -> Tensor:
    """The batch with those items in it, rising indices; what holds them all is the batch."""
    items = items.to(batch.dtype)
    return items if len(items) == len(batch) else batch.index_copy_(0, indices, items)
