from __future__ import annotations

import collections

import pytest
import torch

from common.config import CLASSIFIER_TYPES
from common.errors import InputError
from models.early_exit import EarlyExitUViT
from models.uvit import UViT
from tests.conftest import TINY, perturbed

T = 20


def make(classifier_type: str, **changes) -> EarlyExitUViT:
    return perturbed(EarlyExitUViT(UViT(**TINY, depth=5, **changes), classifier_type, num_timesteps=T)).eval()


@pytest.fixture
def batch():
    return torch.randn(6, 1, 8, 8), torch.tensor([0, 3, 7, 11, 19, 19])


@pytest.mark.parametrize("classifier_type", CLASSIFIER_TYPES)
@pytest.mark.parametrize("quantile", [0.0, 0.1, 0.3, 0.6, 1.0])
@torch.inference_mode()
def test_leaving_early_is_picking_from_the_full_run(classifier_type, quantile, batch):
    model, (x, t) = make(classifier_type), batch
    full = model(x, t)
    threshold = full.uncertainty.quantile(quantile).item()
    want_layer = torch.full((6,), 5)
    want = full.output.clone()
    for b in range(6):
        for layer in range(5):
            if full.uncertainty[layer, b] <= threshold:
                want_layer[b], want[b] = layer, full.exit_outputs[layer, b]
                break
    output, exit_layer = model.early_exit(x, t, threshold=threshold)
    assert exit_layer.dtype == torch.int64
    assert torch.equal(exit_layer, want_layer)
    torch.testing.assert_close(output, want, rtol=1e-4, atol=1e-3)


@torch.inference_mode()
def test_each_block_sees_only_the_images_that_are_left(batch):
    model, (x, t) = make("mlp_probe_per_layer"), batch
    threshold = model(x, t).uncertainty.quantile(0.2).item()
    seen = {}
    for layer, block in enumerate(model.uvit.blocks):
        block.register_forward_hook(lambda _, inputs, __, layer=layer: seen.update({layer: len(inputs[0])}))
    exit_layer = model.early_exit(x, t, threshold=threshold).exit_layer
    assert len(exit_layer.unique()) > 1, "the case is of no use if all leave at one layer"
    assert seen == {n: int((exit_layer > n).sum()) for n in range(5) if (exit_layer > n).any()}


@torch.inference_mode()
def test_trace_tells_what_the_probes_said_of_the_images_that_were_there(batch):
    model, (x, t) = make("attention_probe"), batch
    full = model(x, t)
    trace = model.trace_early_exit(x, t, threshold=full.uncertainty.quantile(0.2).item())
    there = torch.arange(5)[:, None] <= trace.exit_layer
    assert torch.equal(~trace.uncertainty.isnan(), there)
    torch.testing.assert_close(trace.uncertainty[there], full.uncertainty[there], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("classifier_type", CLASSIFIER_TYPES)
@torch.inference_mode()
def test_each_image_meets_the_probe_of_its_own_t(classifier_type, batch):
    model, (x, t) = make(classifier_type), batch
    together = model(x, t).uncertainty
    alone = torch.cat([model(x[b : b + 1], t[b : b + 1]).uncertainty for b in range(6)], dim=1)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_probe_tables_are_single_linear_probes(batch):
    model, (x, t) = make("mlp_probe_per_layer_per_timestep"), batch
    assert model.probes.weight.shape == (5, T, 32)
    tokens = model.uvit.embed(x, model.uvit.time_tokens(t), None)
    for b, own_t in enumerate(t):
        scores = tokens[b] @ model.probes.weight[0, own_t] + model.probes.bias[0, own_t]
        torch.testing.assert_close(model(x, t).uncertainty[0, b], (1 / (1 + (-scores).exp())).mean())


def test_a_frozen_backbone_gets_no_gradient_and_heads_do(batch):
    model, (x, t) = make("mlp_probe_per_timestep"), batch
    model.uvit.requires_grad_(False)
    exits = model(x, t)
    (exits.uncertainty.sum() + exits.exit_outputs.square().sum()).backward()
    assert not exits.output.requires_grad
    assert all(p.grad is None for p in model.uvit.parameters())
    assert all(p.grad is not None for name, p in model.named_parameters() if not name.startswith("uvit."))


@torch.inference_mode()
def test_class_conditional(batch):
    model, (x, t) = make("attention_probe", num_classes=3), batch
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    output, exit_layer = model.early_exit(x, t, y, threshold=-1e9)
    assert exit_layer.tolist() == [5] * 6
    torch.testing.assert_close(output, model.uvit(x, t, y), rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_heads_are_as_the_output_of_the_network_without_its_convolution(batch):
    """A head with the weights of the network's own output makes of the last tokens what the network does."""
    model, (x, t) = make("mlp_probe_per_layer", conv=False), batch
    assert not any("final_layer" in name for name in model.state_dict())
    head, uvit = model.exit_heads[-1], model.uvit
    head.load_state_dict({name: uvit.state_dict()[name] for name in head.state_dict()})
    last = uvit.run_blocks(range(5), uvit.embed(x, uvit.time_tokens(t), None), [])
    torch.testing.assert_close(head(last), uvit(x, t))

    full = model(x, t)
    lowest = full.uncertainty.amin(dim=0).sort().values
    output, exit_layer = model.early_exit(x, t, threshold=lowest[2:4].mean().item())
    assert len(exit_layer.unique()) > 1, "the case is of no use if all leave at one layer"
    made = torch.cat([full.exit_outputs, full.output[None]])
    torch.testing.assert_close(output, made[exit_layer, torch.arange(6)], rtol=1e-4, atol=1e-3)


def test_an_unknown_classifier_type_is_named():
    with pytest.raises(InputError, match="per_pixel"):
        EarlyExitUViT(UViT(**TINY, depth=1), "per_pixel")


@torch.inference_mode()
def test_the_attention_probe_is_attention_with_one_query(batch):
    """Keys and values made for every token, as the equation has it."""
    model, (x, t) = make("attention_probe"), batch
    probe = model.probes[0]
    tokens = model.uvit.embed(x, model.uvit.time_tokens(t), None)
    keys, values = torch.nn.functional.linear(tokens[:, 1:], probe.weight_kv.weight, probe.weight_kv.bias).chunk(2, -1)
    weights = (keys @ probe.q.flatten() / keys.shape[-1] ** 0.5).softmax(dim=1)
    gathered = (weights[..., None] * values).sum(dim=1)
    torch.testing.assert_close(probe(tokens), probe.classification(gathered)[:, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("classifier_type", CLASSIFIER_TYPES)
@torch.inference_mode()
def test_one_timestep_for_all_is_that_timestep_for_each(classifier_type, batch):
    model, (x, _) = make(classifier_type), batch
    together, each = (model.trace_early_exit(x, t, threshold=0.4) for t in (7, torch.full((6,), 7)))
    assert torch.equal(together.exit_layer, each.exit_layer)
    torch.testing.assert_close(together.output, each.output)


@pytest.mark.parametrize("min_group", [2, 3, 4, 6, 100])
@pytest.mark.parametrize("classifier_type", ["mlp_probe_per_layer", "mlp_probe_per_layer_per_timestep"])
@torch.inference_mode()
def test_min_group_changes_no_image(classifier_type, min_group, batch):
    model, (x, t) = make(classifier_type), batch
    threshold = model(x, t).uncertainty.quantile(0.2).item()
    sizes = []
    model.uvit.blocks[-1].register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    want = model.trace_early_exit(x, t, threshold=threshold)
    got = model.trace_early_exit(x, t, threshold=threshold, min_group=min_group)
    assert len(want.exit_layer.unique()) > 2, "the case is of no use if they leave at one or two layers"
    assert torch.equal(got.exit_layer, want.exit_layer)
    assert torch.equal(got.uncertainty.isnan(), want.uncertainty.isnan())
    torch.testing.assert_close(got.output, want.output, rtol=1e-4, atol=1e-3)
    assert min_group < 100 or sizes[-1] == 6, "with so large a group nobody is ever taken out"


class CountOperations(torch.utils._python_dispatch.TorchDispatchMode):
    """How often each operation ran."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.counts[operation.overloadpacket.__name__] += 1
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("min_group", [1, 2])
def test_the_host_waits_once_a_layer_and_heads_run_for_those_that_leave(min_group, batch):
    model, (x, t) = make("mlp_probe_per_layer"), batch
    model.requires_grad_(False)
    threshold = model(x, t).uncertainty.quantile(0.2).item()
    made = {}
    for layer, head in enumerate(model.exit_heads):
        head.register_forward_hook(lambda _, inputs, __, layer=layer: made.update({layer: len(inputs[0])}))
    with CountOperations() as seen:
        exit_layer = model.trace_early_exit(x, t, threshold=threshold, min_group=min_group).exit_layer
    waits = [seen.counts[name] for name in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero")]
    assert waits == [min(5, int(exit_layer.max()) + 1), 0, 0, 0]
    assert made == {n: int((exit_layer == n).sum()) for n in range(5) if (exit_layer == n).any()}


def test_nothing_is_copied_when_nobody_leaves(batch):
    model, (x, t) = make("mlp_probe_per_layer"), batch
    model.requires_grad_(False)
    with CountOperations() as seen:
        exits = model.early_exit(x, t, threshold=-1.0)
    assert exits.exit_layer.tolist() == [5] * 6
    assert not {"index_select", "index", "argsort", "sort"} & seen.counts.keys()
    with CountOperations() as network:
        model.uvit(x, t)
    assert seen.counts["clone"] == network.counts["clone"], "more copies than the network itself makes"
