from __future__ import annotations

import argparse
import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from common.errors import InputError
from models import EarlyExitUViT, UViT, load_weights
from models.weights import read_weights
from tests.conftest import TINY, perturbed


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    theirs = b.state_dict()
    return all(torch.equal(value, theirs[key]) for key, value in a.state_dict().items())


def uvit() -> UViT:
    return perturbed(UViT(**TINY, depth=3))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: weights,
        lambda weights: {f"module.{k}": v for k, v in weights.items()},
        lambda weights: {f"_orig_mod.{k}": v for k, v in weights.items()},
        lambda weights: {f"module._orig_mod.{k}": v for k, v in weights.items()},
        lambda weights: {"model_state_dict": weights, "num_steps": 7, "args": argparse.Namespace(lr=1e-4)},
    ],
)
def test_known_layouts_load(wrap, tmp_path):
    source, target = uvit(), uvit()
    torch.save(wrap(source.state_dict()), tmp_path / "weights.pth")
    load_weights(target, tmp_path / "weights.pth")
    assert same(source, target)


def test_safetensors_load(tmp_path):
    source, target = uvit(), uvit()
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    load_weights(target, str(tmp_path / "weights.safetensors"))
    assert same(source, target)


@pytest.mark.parametrize(
    "classifier_type, key_of",
    [
        ("mlp_probe_per_layer", lambda layer, t: f"{layer}"),
        ("mlp_probe_per_timestep", lambda layer, t: f"{t}"),
        ("mlp_probe_per_layer_per_timestep", lambda layer, t: f"{layer}, {t}"),
    ],
)
def test_the_original_authors_early_exit_names_load(classifier_type, key_of, tmp_path):
    source = perturbed(EarlyExitUViT(UViT(**TINY, depth=3), classifier_type, num_timesteps=4))
    original = {f"uvit.{k}": v for k, v in source.uvit.state_dict().items()}
    heads = ["in_blocks_heads.0", "mid_block_head", "out_blocks_heads.0"]
    for head, name in zip(source.exit_heads, heads, strict=True):
        original |= {f"{name}.{k}": v for k, v in head.state_dict().items()}
    layers, timesteps = source.probes.bias.shape
    for layer in range(layers):
        for t in range(timesteps):
            original[f"matrix.{key_of(layer, t)}.classifier.0.weight"] = source.probes.weight[layer, t][None]
            original[f"matrix.{key_of(layer, t)}.classifier.0.bias"] = source.probes.bias[layer, t][None]
    torch.save({"model_state_dict": original}, tmp_path / "original.pth")
    target = EarlyExitUViT(UViT(**TINY, depth=3), classifier_type, num_timesteps=4)
    load_weights(target, tmp_path / "original.pth")
    assert same(source, target)


def test_averaged_weights_are_the_default(full):
    content = torch.load(full, weights_only=True)
    network = UViT(**content["config"]["model_params"])
    for weights, part in (("ema", "ema"), ("raw", "model")):
        load_weights(network, full, weights)
        assert all(torch.equal(p, content[part][name]) for name, p in network.named_parameters())
    assert not torch.equal(content["ema"]["norm.weight"], content["model"]["norm.weight"])


def test_what_does_not_fit_is_named_and_the_network_is_unchanged(tmp_path):
    path, network = tmp_path / "w.pth", uvit()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    broken = {k: v for k, v in uvit().state_dict().items() if k != "norm.bias"} | {"extra": torch.zeros(1)}
    torch.save(broken, path)
    with pytest.raises(InputError, match=r"1 missing \(norm\.bias\); 1 unexpected \(extra\)"):
        load_weights(network, path)
    torch.save(UViT(**(TINY | {"embed_dim": 16}), depth=3).state_dict(), path)
    with pytest.raises(InputError, match=r"pos_embed \(1, 5, 16\) instead of \(1, 5, 32\)"):
        load_weights(network, path)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize("keep", [0, 1, 100, 3000, -1])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_cut_short_is_named(keep, suffix, tmp_path):
    path = tmp_path / f"w{suffix}"
    save_file(uvit().state_dict(), path) if suffix == ".safetensors" else torch.save(uvit().state_dict(), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=path.name):
        load_weights(uvit(), path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_bytes_load_or_are_named(data, tmp_path):
    """Noise, and checkpoints of both formats with a stretch of bytes changed."""
    kind = data.draw(st.sampled_from(["noise", "zip", "legacy"]))
    path = tmp_path / "any.pth"
    if kind == "noise":
        path.write_bytes(data.draw(st.binary(max_size=200)))
    else:
        torch.save({"a": torch.zeros(2)}, path, _use_new_zipfile_serialization=kind == "zip")
        content = bytearray(path.read_bytes())
        start = data.draw(st.integers(0, len(content) - 1))
        content[start : start + 8] = data.draw(st.binary(max_size=8))
        path.write_bytes(content)
    try:
        read_weights(path)
    except InputError as error:
        assert "any.pth" in str(error)


class Trap:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_would_run_a_command_is_refused(legacy, tmp_path):
    path, mark = tmp_path / "evil.pth", tmp_path / "ran"
    content = {"norm.weight": Trap(mark), "args": argparse.Namespace(x=Trap(mark))}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(InputError, match="evil"):
        load_weights(uvit(), path)
    assert not mark.exists()


def test_other_files_are_named(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        load_weights(uvit(), tmp_path / "none.pth")
    with pytest.raises(InputError, match="no such file"):
        load_weights(uvit(), tmp_path / "none.safetensors")
    with pytest.raises(InputError, match=r"Is a directory"):
        load_weights(uvit(), tmp_path)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(InputError, match="list"):
        load_weights(uvit(), tmp_path / "list.pth")
    torch.save({"format": "duodiff-1", "model": {}}, tmp_path / "part.pth")
    with pytest.raises(InputError, match="parts of it are missing"):
        load_weights(uvit(), tmp_path / "part.pth")
    torch.save({"a": 1}, tmp_path / "numbers.pth")
    with pytest.raises(InputError, match="no state dict"):
        load_weights(uvit(), tmp_path / "numbers.pth")


def test_a_byte_that_changed_is_found(tmp_path):
    """In the middle of a tensor, where torch itself would take it as it comes."""
    model = UViT(**TINY, depth=1)
    path = tmp_path / "w.pth"
    torch.save(model.state_dict(), path)
    content = bytearray(path.read_bytes())
    content[content.index(model.pos_embed.detach().numpy().tobytes()) + 5] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="not what was written"):
        load_weights(model, path)
