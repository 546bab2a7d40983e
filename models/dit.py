"""The DiT backbone: Peebles & Xie, "Scalable Diffusion Models with Transformers", ICCV 2023 (arXiv 2212.09748).

SiT (Ma et al., ECCV 2024, arXiv 2401.08740) has the same network, and differs in what t and the output mean.
Attribute names are those of the public DiT and SiT state dicts, so that those files load as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.config import DiTConfig
from common.errors import InputError
from models.backbone import Backbone
from models.uvit import Attention, Mlp, PatchEmbed, pixels_to_image, timestep_embedding

NUM_FREQUENCIES = 256  # of the timestep embedding, sines and cosines together


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Adaptive layer norm after the norm. x: (B, P, D). shift, scale: (B, 1, D)."""
    return x * (1 + scale) + shift


def norm_without_affine(dim: int) -> nn.LayerNorm:
    """The affine part is the conditioning's."""
    return nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)


def modulation(dim: int, count: int) -> nn.Sequential:
    """Conditioning (B, D) -> (B, count * D): shifts, scales and gates, all 0 in a fresh network."""
    return nn.Sequential(nn.SiLU(), nn.Linear(dim, count * dim))


class TimestepEmbedder(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(NUM_FREQUENCIES, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        """(B,) -> (B, D)."""
        return self.mlp(timestep_embedding(t, NUM_FREQUENCIES).to(next(self.mlp.parameters()).dtype))


class LabelEmbedder(nn.Module):
    """A vector for each class, and a last one for "no class" where the network has that."""

    def __init__(self, num_labels: int, dim: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_labels, dim)

    def forward(self, y: Tensor) -> Tensor:
        """(B,) int64 -> (B, D). Raises InputError for a class the table does not have."""
        try:
            return self.embedding_table(y)
        except IndexError:  # on the CPU; CUDA ends the process, and to look at y first would make the host wait
            last = self.embedding_table.num_embeddings - 1
            raise InputError(f"classes y of {int(y.min())}..{int(y.max())}, the network takes 0..{last}") from None


class DiTBlock(nn.Module):
    """A pre-norm transformer block with adaLN-Zero: the conditioning shifts, scales and gates both halves."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.norm1 = norm_without_affine(dim)
        self.attn = Attention(dim, num_heads, qkv_bias=True)
        self.norm2 = norm_without_affine(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), approximate="tanh")
        self.adaLN_modulation = modulation(dim, 6)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x: (B, P, D). condition: (B, D), or (1, D) for all."""
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = rearrange(
            self.adaLN_modulation(condition), "b (six d) -> six b 1 d", six=6
        )
        x = x + gate_attn * self.attn(modulate(self.norm1(x), shift_attn, scale_attn))
        return x + gate_mlp * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    def __init__(self, dim: int, num_values: int):
        super().__init__()
        self.norm_final = norm_without_affine(dim)
        self.linear = nn.Linear(dim, num_values)
        self.adaLN_modulation = modulation(dim, 2)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """(B, P, D), and (B, D) or (1, D) for all -> the pixels of each patch, (B, P, num_values)."""
        shift, scale = rearrange(self.adaLN_modulation(condition), "b (two d) -> two b 1 d", two=2)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiT(Backbone):
    """Predicts what `parametrization` says from a noisy image, its time and its class.

    model_params: the fields of `DiTConfig`; anything else raises TypeError, a value out of range InputError.

    t: DiT's runs over 0..999, SiT's over [0, 1]. The original DiT guides three of the channels alone; samplers here
    guide all of them.

    The network draws no random numbers, in training neither: class_dropout_prob says whether there is a vector for
    "no class": the code that makes the batch replaces some classes by `config.no_class`.
    """

    config: DiTConfig
    pos_embed: Tensor

    def __init__(self, **model_params: Any):
        super().__init__()
        self.config = config = DiTConfig(**model_params)
        dim = config.hidden_size

        self.x_embedder = PatchEmbed(config.patch_size, config.in_channels, dim)
        self.t_embedder = TimestepEmbedder(dim)
        if config.num_labels:
            self.y_embedder = LabelEmbedder(config.num_labels, dim)
        # Fixed: no parameter, so that nothing trains it; in the state dict since the public files have it.
        self.register_buffer("pos_embed", sincos_positions(config.input_size // config.patch_size, dim))
        self.blocks = nn.ModuleList(DiTBlock(dim, config.num_heads, config.mlp_ratio) for _ in range(config.depth))
        self.out_channels = config.in_channels * (2 if config.learn_sigma else 1)
        self.final_layer = FinalLayer(dim, config.patch_size**2 * self.out_channels)
        self.initialize()

    def initialize(self) -> None:
        """As in the paper: linear layers Xavier uniform, embeddings normal, and zeros that make blocks identities."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.flatten(1))  # patches are projected by a linear layer too
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.t_embedder.mlp:
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
        if self.config.num_labels:
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for module in (*self.blocks, self.final_layer):
            nn.init.zeros_(module.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def time_tokens(self, t: Tensor) -> Tensor:
        """What the network is told of the noise level: t (B,) -> (B, D)."""
        return self.t_embedder(self.time_scale * (t.float() + self.time_shift))

    def condition(self, time: Tensor, y: Tensor | None) -> Tensor:
        """What every block is told: (B, D), or (1, D) for all of an unconditional network.

        time: `time_tokens`, (B, D), or (1, D) for all. y: (B,) int64 classes, for a class-conditional network only.
        Raises InputError where y does not fit the network.
        """
        if (y is not None) != (self.config.num_classes > 0):
            raise InputError(f"classes y {'missing' if y is None else 'given'}, num_classes={self.config.num_classes}")
        return time if y is None else time + self.y_embedder(y)

    def embed(self, x: Tensor) -> Tensor:
        """The tokens that enter the first block: (B, C, H, W) -> (B, P, D). Raises InputError for another shape."""
        if x.shape[1:] != self.config.image_shape:
            raise InputError(f"images of shape {tuple(x.shape[1:])}, the network takes {self.config.image_shape}")
        return self.x_embedder(x.to(self.pos_embed.dtype)) + self.pos_embed

    def run_blocks(self, layers: range, tokens: Tensor, condition: Tensor) -> Tensor:
        for layer in layers:
            if self.grad_checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(self.blocks[layer], tokens, condition, use_reentrant=False)
            else:
                tokens = self.blocks[layer](tokens, condition)
        return tokens

    def decode(self, tokens: Tensor, condition: Tensor) -> Tensor:
        """Tokens after the last block (B, P, D) -> output (B, C, H, W), without a learned variance."""
        image = pixels_to_image(self.final_layer(tokens, condition), self.out_channels)
        return image[:, : self.config.in_channels]

    def denoise(self, x: Tensor, time: Tensor, y: Tensor | None = None) -> Tensor:
        """`forward` for those who have the `time_tokens` already, (B, D), or (1, D) for all."""
        condition = self.condition(time, y)
        return self.decode(self.run_blocks(range(self.config.num_blocks), self.embed(x), condition), condition)

    def middle(self, outer: int) -> range:
        """The layers without the first and the last `outer`; empty where there are no more."""
        return range(outer, self.config.num_blocks - outer)

    def denoise_around(
        self, x: Tensor, time: Tensor, y: Tensor | None, outer: int, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """`denoise`, in which the residual of the middle, see `middle`, may be that of another call.

        residual: (B, P, D), what the middle's blocks add to the tokens that enter the first of them; None to run
        them. Returns the output (B, C, H, W) and the residual.
        """
        middle, condition = self.middle(outer), self.condition(time, y)
        assert middle, f"no middle between {outer} blocks on either side of {self.config.num_blocks}"
        before = self.run_blocks(range(middle.start), self.embed(x), condition)
        if residual is None:
            after = self.run_blocks(middle, before, condition)
            residual = after - before
        else:
            after = before + residual
        after = self.run_blocks(range(middle.stop, self.config.num_blocks), after, condition)
        return self.decode(after, condition), residual


def sincos_positions(side: int, dim: int) -> Tensor:
    """Where each patch is, row by row: (1, side * side, dim).

    The first half of the channels tells the column, the second the row, each by sines and then cosines.
    """
    frequencies = 10_000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=1).float()  # (side, D / 2)
    columns, rows = repeat(line, "w d -> (h w) d", h=side), repeat(line, "h d -> (h w) d", w=side)
    return torch.cat([columns, rows], dim=1)[None]


def without_variance(state_dict: Mapping[str, Tensor], config: DiTConfig) -> dict[str, Tensor]:
    """The state dict of a network that learned a variance, for one that makes none; any other as it is.

    Whether it did is read from the shape of the final layer. What is left predicts the same.
    """
    given, channels = dict(state_dict), config.in_channels
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        learned = 2 * config.patch_size**2 * channels
        if not config.learn_sigma and name in given and given[name].shape[:1] == (learned,):
            given[name] = rearrange(given[name], "(p two c) ... -> two (p c) ...", two=2, c=channels)[0]
    return given
