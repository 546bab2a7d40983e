from __future__ import annotations

import math

import pytest
import torch

from common.errors import InputError
from models.uvit import UViT
from tests.conftest import TINY, perturbed


def by_hand(weights: dict[str, torch.Tensor], x, t, y, *, depth, heads, patch, normalize):
    """The U-ViT as a plain function of its state dict, one image and one token loop at a time."""
    dim = weights["pos_embed"].shape[-1]

    def linear(name, v):
        out = v @ weights[f"{name}.weight"].T
        return out + weights[f"{name}.bias"] if f"{name}.bias" in weights else out

    def norm(name, v):
        centred = v - v.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def block(name, v, skip=None):
        if skip is not None:
            v = linear(f"{name}.skip_linear", torch.cat([v, skip], -1))
        q, k, u = linear(f"{name}.attn.qkv", norm(f"{name}.norm1", v)).split(dim, -1)
        outputs, size = [], dim // heads
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            scores = q[:, part] @ k[:, part].T / math.sqrt(size)
            outputs.append(scores.softmax(-1) @ u[:, part])
        v = v + linear(f"{name}.attn.proj", torch.cat(outputs, -1))
        hidden = linear(f"{name}.mlp.fc1", norm(f"{name}.norm2", v))
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        return v + linear(f"{name}.mlp.fc2", hidden)

    images = []
    for b in range(len(x)):
        side = x.shape[-1] // patch
        patches = [
            x[b, :, r * patch : (r + 1) * patch, c * patch : (c + 1) * patch].flatten()
            for r in range(side)
            for c in range(side)
        ]
        kernel = weights["patch_embed.proj.weight"].flatten(1)
        tokens = torch.stack(patches) @ kernel.T + weights["patch_embed.proj.bias"]
        time = float(t[b]) / 1000 if normalize else float(t[b])
        angles = torch.tensor([time * 10_000 ** (-i / (dim // 2)) for i in range(dim // 2)])
        embedded = torch.cat([angles.cos(), angles.sin()])
        if "time_embed.0.weight" in weights:
            hidden = linear("time_embed.0", embedded)
            embedded = linear("time_embed.2", hidden * hidden.sigmoid())
        extras = [embedded] if y is None else [weights["label_emb.weight"][y[b]], embedded]
        v = torch.cat([torch.stack(extras), tokens]) + weights["pos_embed"][0]
        skips = []
        for i in range(depth // 2):
            v = block(f"in_blocks.{i}", v)
            skips.append(v)
        v = block("mid_block", v)
        for i in range(depth // 2):
            v = block(f"out_blocks.{i}", v, skips.pop())
        pixels = linear("decoder_pred", norm("norm", v))[len(extras) :]
        channels = x.shape[1]
        image = torch.empty_like(x[b])
        for n, row in enumerate(pixels):
            r, c = divmod(n, side)
            square = row.reshape(patch, patch, channels).permute(2, 0, 1)
            image[:, r * patch : (r + 1) * patch, c * patch : (c + 1) * patch] = square
        if "final_layer.weight" not in weights:
            images.append(image)
            continue
        kernel = weights["final_layer.weight"]
        padded = torch.zeros(channels, x.shape[2] + 2, x.shape[3] + 2)
        padded[:, 1:-1, 1:-1] = image
        windows = padded.unfold(1, 3, 1).unfold(2, 3, 1)
        filtered = torch.einsum("ockl,chwkl->ohw", kernel, windows)
        images.append(filtered + weights["final_layer.bias"][:, None, None])
    return torch.stack(images)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_classes": 5, "mlp_time_embed": True, "qkv_bias": True},
        {"normalize_timesteps": True, "in_chans": 3, "depth": 3},
        {"patch_size": 2, "depth": 1, "mlp_ratio": 2},
        {"patch_size": 2, "in_chans": 3, "conv": False, "num_classes": 5},
    ],
)
def test_forward_is_the_network_written_out_by_hand(changes):
    params = TINY | {"depth": 5} | changes
    uvit = perturbed(UViT(**params))
    x = torch.randn(3, params["in_chans"], 8, 8)
    t = torch.tensor([0, 17, 999])
    y = torch.tensor([4, 0, 2]) if "num_classes" in changes else None
    want = by_hand(
        uvit.state_dict(), x, t, y,
        depth=params["depth"], heads=4, patch=params["patch_size"], normalize=changes.get("normalize_timesteps"),
    )  # fmt: skip
    torch.testing.assert_close(uvit(x, t, y), want, rtol=2e-3, atol=2e-3 * want.abs().max().item())


def test_depth_12_and_13_are_the_same_network():
    even, odd = UViT(**TINY, depth=4), UViT(**TINY, depth=5)
    assert even.state_dict().keys() == odd.state_dict().keys()
    assert len(even.blocks) == even.config.num_blocks == 5


def test_names_are_those_of_the_public_weights():
    names = UViT(**TINY, depth=3, num_classes=2, mlp_time_embed=True).state_dict().keys()
    blocks = {name.split(".")[0] for name in names}
    assert blocks == {
        *("patch_embed", "time_embed", "label_emb", "pos_embed", "in_blocks", "mid_block", "out_blocks"),
        *("norm", "decoder_pred", "final_layer"),
    }
    assert {"time_embed.0.weight", "time_embed.2.bias", "out_blocks.0.skip_linear.weight"} <= set(names)


def test_without_the_convolution_its_two_parameters_are_all_that_is_missing():
    with_it, without = (UViT(**TINY, depth=3, conv=conv).state_dict().keys() for conv in (True, False))
    assert with_it - without == {"final_layer.weight", "final_layer.bias"} and without < with_it
    assert UViT(**TINY, depth=3).state_dict().keys() == with_it, "the default has one"


def test_an_image_alone_is_the_image_in_a_batch():
    uvit = perturbed(UViT(**TINY, depth=3))
    x, t = torch.randn(4, 1, 8, 8), torch.tensor([3, 500, 7, 999])
    torch.testing.assert_close(uvit(x[2:3], t[2:3]), uvit(x, t)[2:3], rtol=1e-4, atol=1e-4)


def test_one_timestep_stands_for_the_whole_batch():
    uvit = perturbed(UViT(**TINY, depth=3))
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(uvit(x, 7), uvit(x, torch.tensor([7, 7])))


@torch.no_grad()
def test_around_the_middle_with_the_residual_of_another_call():
    """Seven blocks, of which the second in block and the last but one out block are the ends of the middle."""
    uvit = perturbed(UViT(**TINY, depth=7)).eval()
    (in_0, in_1, in_2), mid, (out_0, out_1, out_2) = uvit.in_blocks, uvit.mid_block, uvit.out_blocks
    x, then = torch.randn(2, 2, 1, 8, 8)
    time, later = uvit.time_tokens(torch.tensor([700, 690])).split(1)

    first = in_0(uvit.embed(x, time, None))
    second = in_1(first)
    third = in_2(second)
    last = out_1(out_0(mid(third), third), second)
    output, residual = uvit.denoise_around(x, time, None, 1)
    torch.testing.assert_close(residual, last - first)
    assert torch.equal(output, uvit.denoise(x, time)), "bit for bit: computed, not put together"

    enters = in_0(uvit.embed(then, later, None))
    want = uvit.decode(out_2(enters + (last - first), enters))
    output, same = uvit.denoise_around(then, later, None, 1, residual)
    torch.testing.assert_close(output, want)
    assert same is residual and not torch.allclose(output, uvit.denoise(then, later))

    assert [list(uvit.middle(outer)) for outer in (1, 2, 3, 4)] == [[1, 2, 3, 4, 5], [2, 3, 4], [3], []]
    assert not UViT(**TINY, depth=1).middle(1) and UViT(**TINY, depth=2).middle(1)


def test_gradient_checkpointing_changes_no_gradient():
    uvit = perturbed(UViT(**TINY, depth=5))
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 500])
    gradients = []
    for uvit.grad_checkpointing in (False, True):
        uvit.zero_grad()
        uvit(x, t).square().sum().backward()
        gradients.append([p.grad.clone() for p in uvit.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    "wrong, word",
    [
        ({"patch_size": 3}, "patch_size=3"),
        ({"num_heads": 5}, "num_heads=5"),
        ({"embed_dim": 0}, "embed_dim=0"),
        ({"num_classes": 0}, "num_classes=0"),
        ({"mlp_ratio": 0}, "mlp_ratio=0"),
    ],
)
def test_parameters_that_make_no_network_are_named(wrong, word):
    with pytest.raises(InputError, match=word):
        UViT(**(TINY | wrong))


def test_inputs_that_do_not_fit_are_named():
    uvit, x = UViT(**TINY, depth=1), torch.zeros(1, 1, 8, 8)
    with pytest.raises(InputError, match="shape"):
        uvit(torch.zeros(1, 3, 8, 8), 0)
    with pytest.raises(InputError, match="given"):
        uvit(x, 0, torch.tensor([0]))
    with pytest.raises(InputError, match="missing"):
        UViT(**TINY, depth=1, num_classes=3)(x, 0)
    with pytest.raises(TypeError):
        UViT(**TINY, dept=1)
