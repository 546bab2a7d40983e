from __future__ import annotations

import math
from typing import ClassVar

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from common.config import DiTConfig
from common.errors import InputError
from diffusion.forecast import Forecast
from generation.denoisers import reusing
from models import DiT, load_weights
from models.inference import BackboneDenoiser
from tests.conftest import perturbed

SMALL = {
    **{"input_size": 8, "patch_size": 2, "in_channels": 3, "hidden_size": 32, "depth": 3, "num_heads": 4},
    **{"mlp_ratio": 2, "class_dropout_prob": 0.1, "num_classes": 5},
}
CPU = torch.device("cpu")


def make(**changes) -> DiT:
    """Random everywhere, and small enough that rounding does not grow on its way through scales and gates."""
    dit = perturbed(DiT(**SMALL | changes)).eval().requires_grad_(False)
    for parameter in dit.parameters():
        parameter *= 0.4
    return dit


@pytest.fixture
def batch():
    return torch.randn(4, 3, 8, 8), torch.tensor([0, 17, 500, 999]), torch.tensor([4, 0, 5, 2])


def by_hand(weights: dict[str, torch.Tensor], x, t, y, *, depth, heads, patch):
    """The network of the paper's figure 3 as a plain function of its state dict, an image and a head at a time."""
    dim = weights["pos_embed"].shape[-1]

    def linear(name, v):
        return v @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def silu(v):
        return v / (1 + (-v).exp())

    def norm(v):
        centred = v - v.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    images = []
    for b in range(len(x)):
        side = x.shape[-1] // patch
        patches = [
            x[b, :, r * patch : (r + 1) * patch, c * patch : (c + 1) * patch].flatten()
            for r in range(side)
            for c in range(side)
        ]
        kernel = weights["x_embedder.proj.weight"].flatten(1)
        v = torch.stack(patches) @ kernel.T + weights["x_embedder.proj.bias"] + weights["pos_embed"][0]
        angles = torch.tensor([float(t[b]) * 10_000 ** (-i / 128) for i in range(128)], dtype=x.dtype)
        told = linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()]))
        told = linear("t_embedder.mlp.2", silu(told))
        if y is not None:
            told = told + weights["y_embedder.embedding_table.weight"][y[b]]
        for n in range(depth):
            name = f"blocks.{n}"
            six = linear(f"{name}.adaLN_modulation.1", silu(told))
            shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (six[i * dim : (i + 1) * dim] for i in range(6))
            q, k, u = linear(f"{name}.attn.qkv", norm(v) * (1 + scale_a) + shift_a).split(dim, -1)
            outputs, size = [], dim // heads
            for h in range(heads):
                part = slice(h * size, (h + 1) * size)
                scores = (q[:, part] @ k[:, part].T / math.sqrt(size)).exp()
                outputs.append(scores / scores.sum(1, keepdim=True) @ u[:, part])
            v = v + gate_a * linear(f"{name}.attn.proj", torch.cat(outputs, -1))
            hidden = linear(f"{name}.mlp.fc1", norm(v) * (1 + scale_m) + shift_m)
            hidden = hidden / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
            v = v + gate_m * linear(f"{name}.mlp.fc2", hidden)
        shift, scale = linear("final_layer.adaLN_modulation.1", silu(told)).split(dim)
        pixels = linear("final_layer.linear", norm(v) * (1 + scale) + shift)
        image = torch.empty_like(x[b])
        for n, row in enumerate(pixels):
            r, c = divmod(n, side)
            square = row.reshape(patch, patch, -1)[:, :, : len(image)]  # a variance comes behind
            image[:, r * patch : (r + 1) * patch, c * patch : (c + 1) * patch] = square.permute(2, 0, 1)
        images.append(image)
    return torch.stack(images)


@pytest.mark.parametrize(
    "changes", [{}, {"learn_sigma": True, "depth": 2}, {"patch_size": 4, "mlp_ratio": 4}, {"num_classes": -1}]
)
def test_forward_is_the_network_written_out_by_hand(changes, batch):
    params = SMALL | changes
    dit, (x, t, y) = make(**changes), batch
    y = y if params["num_classes"] > 0 else None
    dit, x = dit.double(), x.double()
    # Of large t single precision, in which the sinusoids are made, leaves a few digits.
    for times, tolerance in ((t, 1e-3), (torch.tensor([0.0, 0.001, 0.5, 1.0]), 1e-6)):  # DiT's, and SiT's
        want = by_hand(
            dit.state_dict(), x, times, y, depth=params["depth"], heads=params["num_heads"], patch=params["patch_size"]
        )
        got = dit(x, times, y)
        assert got.shape == x.shape
        torch.testing.assert_close(got, want, rtol=0, atol=tolerance * want.abs().max().item())


def test_an_image_alone_is_the_image_in_a_batch(batch):
    dit, (x, t, y) = make(), batch
    together = dit(x, t, y)
    for b in range(4):
        one = slice(b, b + 1)
        torch.testing.assert_close(dit(x[one], t[one], y[one])[0], together[b], rtol=1e-4, atol=1e-4)


def test_t_is_a_number_or_one_for_each_image_whole_or_not(batch):
    dit, (x, _, y) = make(), batch
    want = dit(x, torch.tensor([7, 7, 7, 7]), y)
    for t in (7, 7.0, torch.full((4,), 7.0)):
        assert torch.equal(dit(x, t, y), want)
    between = dit(x, 0.25, y)
    assert not torch.allclose(between, dit(x, 0, y)) and not torch.allclose(between, dit(x, 0.5, y))


def test_a_fresh_network_makes_zeros_and_its_blocks_are_identities(batch):
    x, t, y = batch
    for params in (SMALL, SMALL | {"learn_sigma": True}):
        dit = DiT(**params)
        condition = dit.condition(dit.time_tokens(t), y)
        assert condition.abs().min() > 0, "told nothing, any block is one"
        tokens = dit.embed(x)
        for block in dit.blocks:
            assert torch.equal(block(tokens, condition), tokens)
        assert torch.equal(dit(x, t, y), torch.zeros_like(x))


def test_fresh_weights_are_as_the_paper_has_them():
    dit = DiT(**SMALL | {"hidden_size": 256, "depth": 1})
    for weight, fans in (
        (dit.blocks[0].attn.qkv.weight, 256 + 768),
        (dit.blocks[0].mlp.fc2.weight, 512 + 256),
        (dit.x_embedder.proj.weight, 3 * 2 * 2 + 256),
    ):
        bound = math.sqrt(6 / fans)
        assert 0.99 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    for weight in (dit.t_embedder.mlp[0].weight, dit.t_embedder.mlp[2].weight, dit.y_embedder.embedding_table.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not any(p.any() for name, p in dit.named_parameters() if name.endswith("bias"))


def test_what_is_zero_at_first_learns(batch):
    """In two steps: first the output layer, then, through it, every other tensor."""
    x, t, y = batch
    dit = DiT(**SMALL)
    optimizer = torch.optim.SGD(dit.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        F.mse_loss(dit(x, t, y), -x).backward()
        optimizer.step()
    still = [name for name, p in dit.named_parameters() if not p.grad.any()]
    assert not still


def test_positions_are_sines_and_cosines_of_column_and_row():
    side, dim = 3, 16
    positions = DiT(input_size=6, patch_size=2, hidden_size=dim, num_heads=2, depth=1).pos_embed
    assert positions.shape == (1, side * side, dim) and positions.dtype == torch.float32
    for n in range(side * side):
        row, column = divmod(n, side)
        rates = [10_000 ** (-i / 4) for i in range(4)]
        want = [wave(rate * place) for place in (column, row) for wave in (math.sin, math.cos) for rate in rates]
        assert positions[0, n].tolist() == pytest.approx(want, abs=1e-7)


def test_positions_are_no_parameter_but_come_from_the_file(tmp_path):
    dit = DiT(**SMALL)
    assert "pos_embed" not in dict(dit.named_parameters())
    dit.requires_grad_(True)
    assert not dit.pos_embed.requires_grad
    weights = dit.state_dict() | {"pos_embed": torch.randn(1, 16, 32)}
    save_file(weights, tmp_path / "dit.safetensors")
    load_weights(dit, tmp_path / "dit.safetensors")
    assert torch.equal(dit.pos_embed, weights["pos_embed"])


def test_names_are_those_of_the_public_weights():
    names = DiT(**SMALL | {"depth": 1}).state_dict().keys()
    linears = [
        *("x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2", "final_layer.linear"),
        *("blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2"),
        *("blocks.0.adaLN_modulation.1", "final_layer.adaLN_modulation.1"),
    ]
    tensors = {f"{name}.{part}" for name in linears for part in ("weight", "bias")}
    assert names == tensors | {"pos_embed", "y_embedder.embedding_table.weight"}


@pytest.mark.parametrize(
    "depth, width, heads, published, exactly",
    [
        (12, 384, 6, 33, 32_963_360),
        (12, 768, 12, 130, 130_512_416),
        (24, 1024, 16, 458, 458_102_816),
        (28, 1152, 16, 675, 675_129_632),
    ],
    ids=["S", "B", "L", "XL"],
)
def test_sizes_are_the_published_ones(depth, width, heads, published, exactly):
    """The counts by hand: a block has 12 D^2 of weights, 9 D of biases, and 6 D^2 + 6 D of adaLN-Zero."""
    d = width
    block = 12 * d * d + 9 * d + 6 * d * d + 6 * d
    embeddings = (16 + 1) * d + (256 + 1) * d + (d + 1) * d + 1001 * d + 256 * d
    assert depth * block + embeddings + 2 * (d * d + d) + 32 * (d + 1) == exactly
    with torch.device("meta"):
        dit = DiT(depth=depth, hidden_size=width, num_heads=heads, input_size=32, patch_size=2, learn_sigma=True)
    count = sum(value.numel() for value in dit.state_dict().values())
    assert count == exactly and abs(count / 1e6 - published) < 1


def test_the_defaults_are_those_of_the_largest():
    with torch.device("meta"):
        assert sum(p.numel() for p in DiT(learn_sigma=True).state_dict().values()) == 675_129_632


class TestLearnedVariance:
    def test_it_is_dropped(self, batch):
        x, t, y = batch
        dit = make(learn_sigma=True)
        assert dit.final_layer.linear.out_features == 2 * 3 * 2 * 2
        before = dit(x, t, y)
        assert before.shape == x.shape
        variance = torch.arange(24) % 6 >= 3  # of (p, p, 2 C), channels last
        dit.final_layer.linear.weight[variance] = 100.0
        dit.final_layer.linear.bias[variance] = -100.0
        assert torch.equal(dit(x, t, y), before)
        dit.final_layer.linear.bias[~variance] += 1
        torch.testing.assert_close(dit(x, t, y), before + 1)

    def test_without_it_stated_weights_of_either_kind_load(self, batch, tmp_path):
        x, t, y = batch
        for learned in (True, False):
            source, target = make(learn_sigma=learned), make()
            wrapped = {f"module.{name}": value for name, value in source.state_dict().items()}
            save_file(wrapped, tmp_path / "dit.safetensors")
            load_weights(target, tmp_path / "dit.safetensors")
            torch.testing.assert_close(target(x, t, y), source(x, t, y), rtol=1e-5, atol=1e-5)

    def test_stated_weights_must_have_it(self, tmp_path):
        save_file(make().state_dict(), tmp_path / "dit.safetensors")
        with pytest.raises(InputError, match=r"final_layer.linear.weight \(12, 32\) instead of \(24, 32\)"):
            load_weights(make(learn_sigma=True), tmp_path / "dit.safetensors")


class TestClasses:
    @pytest.mark.parametrize("y", [6, -1])
    def test_one_that_is_not_there_is_named(self, y, batch):
        x, t, _ = batch
        with pytest.raises(InputError, match=rf"{y}\b.* takes 0\.\.5"):
            make()(x, t, torch.tensor([0, 5, 1, 5 if y < 0 else 0]).index_fill(0, torch.tensor([2]), y))

    def test_no_class_is_there_where_labels_are_dropped(self, batch):
        x, t, _ = batch
        assert make()(x, t, torch.full((4,), 5)).shape == x.shape
        config = make(class_dropout_prob=0.0).config
        assert (config.no_class, config.num_labels) == (None, 5)
        with pytest.raises(InputError, match=r"takes 0\.\.4"):
            make(class_dropout_prob=0.0)(x, t, torch.full((4,), 5))

    def test_missing_or_given_to_a_network_without(self, batch):
        x, t, y = batch
        with pytest.raises(InputError, match="missing"):
            make()(x, t)
        unconditional = make(num_classes=-1)
        assert (unconditional.config.no_class, unconditional.config.num_labels) == (None, 0)
        with pytest.raises(InputError, match="given"):
            unconditional(x, t, y)

    def test_none_is_dropped_by_the_network_itself(self, batch):
        """In training too: the same batch gives the same output, and no random number is drawn."""
        dit, (x, t, y) = make(class_dropout_prob=0.9).train(), batch
        state = torch.get_rng_state()
        assert torch.equal(dit(x, t, y), dit(x, t, y))
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"patch_size": 3}, "input_size=8 is no multiple of patch_size=3"),
        ({"num_heads": 5}, "num_heads=5"),
        ({"hidden_size": 30, "num_heads": 3}, "hidden_size=30 is no multiple of 4"),
        ({"hidden_size": 0}, "hidden_size=0"),
        ({"depth": 0}, "depth=0"),
        ({"in_channels": 257}, "in_channels=257"),
        ({"num_classes": 0}, "num_classes=0"),
        ({"mlp_ratio": 0}, "mlp_ratio=0"),
        ({"class_dropout_prob": 1.5}, "class_dropout_prob=1.5"),
        ({"class_dropout_prob": math.nan}, "class_dropout_prob=nan"),
    ],
)
def test_parameters_that_make_no_network_are_named(wrong, words):
    with pytest.raises(InputError, match=words):
        DiTConfig(**SMALL | wrong)


def test_inputs_that_do_not_fit_are_named(batch):
    _, t, y = batch
    with pytest.raises(InputError, match="shape"):
        make()(torch.zeros(4, 4, 8, 8), t, y)
    with pytest.raises(TypeError):
        DiT(**SMALL, img_size=8)


def test_the_time_input_is_scaled_and_shifted(batch):
    dit, (x, t, y) = make(), batch
    want = dit(x, 0.5 * (t + 3), y)
    dit.time_scale, dit.time_shift = 0.5, 3.0
    torch.testing.assert_close(dit(x, t, y), want)


def test_gradient_checkpointing_changes_no_gradient(batch):
    x, t, y = batch
    dit = perturbed(DiT(**SMALL))
    gradients = []
    for dit.grad_checkpointing in (False, True):
        dit.zero_grad()
        dit(x, t, y).square().sum().backward()
        gradients.append([p.grad.clone() for p in dit.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@torch.inference_mode()
def test_around_the_middle_with_the_residual_of_another_call(batch):
    dit, (x, _, y) = make(depth=4), batch
    then = torch.randn_like(x)
    time, later = dit.time_tokens(torch.tensor([700, 690])).split(1)
    condition, new_condition = dit.condition(time, y), dit.condition(later, y)

    first = dit.blocks[0](dit.embed(x), condition)
    third = dit.blocks[2](dit.blocks[1](first, condition), condition)
    output, residual = dit.denoise_around(x, time, y, 1)
    torch.testing.assert_close(residual, third - first)
    assert torch.equal(output, dit.denoise(x, time, y)), "bit for bit: computed, not put together"

    enters = dit.blocks[0](dit.embed(then), new_condition)
    want = dit.decode(dit.blocks[3](enters + (third - first), new_condition), new_condition)
    output, same = dit.denoise_around(then, later, y, 1, residual)
    torch.testing.assert_close(output, want)
    assert same is residual and not torch.allclose(output, dit.denoise(then, later, y))
    assert [list(dit.middle(outer)) for outer in (1, 2)] == [[1, 2], []]


class TestAsSamplersRunIt:
    TIMESTEPS: ClassVar = {t: t for t in (999, 998, 500, 0)}

    @torch.inference_mode()
    def test_in_fp32_it_is_the_network(self, batch):
        x, _, y = batch
        for changes, classes in (({}, y), ({"num_classes": -1}, None)):
            dit = make(**changes)
            denoiser = BackboneDenoiser(dit, self.TIMESTEPS, torch.float32, CPU)
            for t in self.TIMESTEPS:
                torch.testing.assert_close(denoiser(x, t, classes), dit(x, t, classes), rtol=1e-4, atol=1e-4)

    @torch.inference_mode()
    def test_in_half_precision_neighbouring_timesteps_stay_apart(self, batch):
        """bf16 has no 998: the sinusoids are made of the exact number."""
        dit, (x, _, y) = make(), batch
        exact, want = dit.time_tokens(torch.tensor(list(self.TIMESTEPS))), dit(x, 500, y)
        denoiser = BackboneDenoiser(dit, self.TIMESTEPS, torch.bfloat16, CPU)
        told = torch.cat([denoiser.time_tokens[t] for t in self.TIMESTEPS])
        torch.testing.assert_close(told.float(), exact, rtol=2**-8, atol=0)
        got = denoiser(x, 500, y)
        assert got.dtype == torch.float32
        assert 0 < (got - want).abs().max() < 0.1 * want.abs().max()

    @torch.inference_mode()
    @pytest.mark.slow
    def test_compiled_and_with_a_cache(self, batch):
        x, _, y = batch
        dit = make()
        runs = []
        for compiled in (False, True):
            network = BackboneDenoiser(dit, self.TIMESTEPS, torch.float32, CPU, compiled=compiled)
            denoiser = reusing(network.around(1), Forecast([list(self.TIMESTEPS)], 2, order=0))
            runs.append(torch.stack([denoiser(x, t, y) for t in self.TIMESTEPS]))
        torch.testing.assert_close(*runs, rtol=1e-4, atol=1e-3)
        plain = torch.stack([dit(x, t, y) for t in self.TIMESTEPS])
        fresh = (runs[0] - plain).abs().amax(dim=(1, 2, 3, 4)) < 1e-3
        assert fresh.tolist() == [True, False, True, False]
