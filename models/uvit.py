"""The U-ViT backbone: Bao et al., "All are Worth Words: A ViT Backbone for Diffusion Models", CVPR 2023.

Attribute names are those of the public U-ViT state dicts, so that those files load as they are.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from common.config import UViTConfig
from common.errors import InputError
from models.backbone import Backbone


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10_000) -> Tensor:
    """Sinusoids of geometrically spaced frequencies, cosines first. (B,) -> (B, dim)."""
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    angles = timesteps[:, None].float() * torch.exp(-math.log(max_period) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class PatchEmbed(nn.Module):
    """Cuts an image into patches and maps each to a token."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return rearrange(self.proj(x), "b d h w -> b (h w) d")


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int, qkv_bias: bool):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.num_heads)
        return self.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)"))


class Mlp(nn.Module):
    """approximate: of GELU, "none" or "tanh"."""

    def __init__(self, dim: int, hidden_dim: int, approximate: str = "none"):
        super().__init__()
        self.approximate = approximate
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate=self.approximate))


class Block(nn.Module):
    """A pre-norm transformer block; in the second half of the network it first takes in a long skip."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, qkv_bias: bool, skip: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads, qkv_bias)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.skip_linear = nn.Linear(2 * dim, dim) if skip else None

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """x, skip: (B, N, D)."""
        if self.skip_linear is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def final_convolution(config: UViTConfig) -> nn.Module:
    """The last layer of an output head, (B, C, H, W) -> (B, C, H, W); with conv=False it does nothing."""
    return nn.Conv2d(config.in_chans, config.in_chans, kernel_size=3, padding=1) if config.conv else nn.Identity()


def patches_to_image(
    patches: Tensor, norm: nn.Module, decoder_pred: nn.Module, final_layer: nn.Module, in_chans: int
) -> Tensor:
    """The output head, of the network and of every exit: patch tokens (B, P, D) -> image (B, C, H, W)."""
    return final_layer(pixels_to_image(decoder_pred(norm(patches)), in_chans))


def pixels_to_image(pixels: Tensor, channels: int) -> Tensor:
    """The pixels of each patch, (B, P, p * p * C) -> (B, C, H, W)."""
    side, p = math.isqrt(pixels.shape[1]), math.isqrt(pixels.shape[2] // channels)
    return rearrange(pixels, "b (h w) (p q c) -> b c (h p) (w q)", h=side, p=p, q=p, c=channels)


class UViT(Backbone):
    """Predicts what `parametrization` says from a noisy image and its timestep.

    model_params: the fields of `UViTConfig`; anything else raises TypeError, a value out of range InputError.
    """

    config: UViTConfig

    def __init__(self, **model_params):
        super().__init__()
        self.config = config = UViTConfig(**model_params)
        dim, half = config.embed_dim, config.depth // 2

        self.patch_embed = PatchEmbed(config.patch_size, config.in_chans, dim)
        self.time_embed = nn.Identity()
        if config.mlp_time_embed:
            self.time_embed = nn.Sequential(nn.Linear(dim, 4 * dim), nn.SiLU(), nn.Linear(4 * dim, dim))
        if config.num_classes > 0:
            self.label_emb = nn.Embedding(config.num_classes, dim)
        self.num_extras = 2 if config.num_classes > 0 else 1
        num_patches = (config.img_size // config.patch_size) ** 2
        self.pos_embed = nn.Parameter(torch.zeros(1, self.num_extras + num_patches, dim))

        def block(skip: bool) -> Block:
            return Block(dim, config.num_heads, config.mlp_ratio, config.qkv_bias, skip)

        self.in_blocks = nn.ModuleList(block(skip=False) for _ in range(half))
        self.mid_block = block(skip=False)
        self.out_blocks = nn.ModuleList(block(skip=True) for _ in range(half))

        self.norm = nn.LayerNorm(dim)
        self.decoder_pred = nn.Linear(dim, config.patch_size**2 * config.in_chans)
        self.final_layer = final_convolution(config)

        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.apply(init_linear)

    @property
    def blocks(self) -> list[Block]:
        """All L blocks in the order they run."""
        return [*self.in_blocks, self.mid_block, *self.out_blocks]

    def time_tokens(self, timesteps: Tensor) -> Tensor:
        """What the network is told of the noise level: timesteps (B,) -> (B, D)."""
        timesteps = self.time_scale * (timesteps.float() + self.time_shift)
        if self.config.normalize_timesteps:
            timesteps = timesteps / 1000
        embedding = timestep_embedding(timesteps, self.config.embed_dim)
        return self.time_embed(embedding.to(self.pos_embed.dtype))

    def embed(self, x: Tensor, time: Tensor, y: Tensor | None) -> Tensor:
        """The tokens that enter the first block, (B, E + P, D): class (if any), time, patches.

        x: (B, C, H, W). time: `time_tokens`, (B, D), or (1, D) for all. y: (B,) int64 classes, for a
        class-conditional network only. Raises InputError where x or y do not fit the network.
        """
        config = self.config
        if x.shape[1:] != config.image_shape:
            raise InputError(f"images of shape {tuple(x.shape[1:])}, the network takes {config.image_shape}")
        if (y is not None) != (config.num_classes > 0):
            raise InputError(f"classes y {'missing' if y is None else 'given'}, num_classes={config.num_classes}")
        patches = self.patch_embed(x.to(self.pos_embed.dtype))
        tokens = [time[:, None].expand(len(x), -1, -1), patches]
        if y is not None:
            tokens.insert(0, self.label_emb(y)[:, None])
        return torch.cat([token.to(patches.dtype) for token in tokens], dim=1) + self.pos_embed

    def run_block(self, layer: int, tokens: Tensor, skips: list[Tensor]) -> Tensor:
        """Block number `layer` (0..L-1). The first half push onto `skips`, the second half pop from it."""
        block, half = self.blocks[layer], len(self.in_blocks)
        inputs = [tokens, skips.pop()] if layer > half else [tokens]
        if self.grad_checkpointing and torch.is_grad_enabled():
            tokens = checkpoint(block, *inputs, use_reentrant=False)
        else:
            tokens = block(*inputs)
        if layer < half:
            skips.append(tokens)
        return tokens

    def decode(self, tokens: Tensor) -> Tensor:
        """Tokens after the last block (B, E + P, D) -> output (B, C, H, W)."""
        patches = tokens[:, self.num_extras :]
        return patches_to_image(patches, self.norm, self.decoder_pred, self.final_layer, self.config.in_chans)

    def denoise(self, x: Tensor, time: Tensor, y: Tensor | None = None) -> Tensor:
        """`forward` for those who have the `time_tokens` already, (B, D), or (1, D) for all."""
        return self.decode(self.run_blocks(range(self.config.num_blocks), self.embed(x, time, y), []))

    def run_blocks(self, layers: range, tokens: Tensor, skips: list[Tensor]) -> Tensor:
        for layer in layers:
            tokens = self.run_block(layer, tokens, skips)
        return tokens

    def middle(self, outer: int) -> range:
        """The layers without the first `outer` in blocks and the last `outer` out blocks.

        A long skip that begins in there ends in there. Empty where outer > depth // 2.
        """
        return range(outer, self.config.num_blocks - outer)

    def denoise_around(
        self, x: Tensor, time: Tensor, y: Tensor | None, outer: int, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """`denoise`, in which the residual of the middle, see `middle`, may be that of another call.

        residual: (B, E + P, D), what the middle's blocks add to the tokens that enter the first of them; None to run
        them. Returns the output (B, C, H, W) and the residual.
        """
        middle, skips = self.middle(outer), []
        assert middle, f"no middle between {outer} blocks on either side of {self.config.num_blocks}"
        before = self.run_blocks(range(middle.start), self.embed(x, time, y), skips)
        if residual is None:
            after = self.run_blocks(middle, before, skips)
            residual = after - before
        else:
            after = before + residual
        return self.decode(self.run_blocks(range(middle.stop, self.config.num_blocks), after, skips)), residual


def init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
