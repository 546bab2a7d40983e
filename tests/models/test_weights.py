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
from training.checkpoint import read_checkpoint, step_of


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
    with pytest.raises(InputError, match="is a folder"):
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
    with pytest.raises(InputError, match="has a wrong checksum"):
        load_weights(model, path)


def save(content: dict, path: Path) -> Path:
    save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path)
    return path


@pytest.mark.parametrize(
    "value, dtype",
    [
        *((value, torch.float32) for value in (float("nan"), float("inf"), float("-inf"))),
        (float("nan"), torch.float16),
        (1e300, torch.float64),  # infinite as soon as the network has it
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_that_are_not_finite_are_named(value, dtype, suffix, tmp_path):
    weights = {name: tensor.clone() for name, tensor in uvit().state_dict().items()}
    weights["mid_block.norm2.bias"] = weights["mid_block.norm2.bias"].to(dtype)
    weights["mid_block.norm2.bias"][3] = value
    network = uvit()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    path = save(weights, tmp_path / f"w{suffix}")
    with pytest.raises(InputError, match=rf"w\{suffix}: mid_block\.norm2\.bias .*not finite"):
        load_weights(network, path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_of_a_checkpoint_the_weights_that_are_asked_for_must_be_finite(full, tmp_path):
    content = torch.load(full, weights_only=True)
    network = UViT(**content["config"]["model_params"])
    for part, bad, good in (("ema", "ema", "raw"), ("model", "raw", "ema")):
        changed = {**content, part: {**content[part], "norm.weight": torch.full((32,), torch.nan)}}
        path = save(changed, tmp_path / f"{part}.pth")
        load_weights(network, path, good)
        with pytest.raises(InputError, match=r"norm\.weight .*not finite"):
            load_weights(network, path, bad)
        with pytest.raises(InputError, match=rf"{part}\.norm\.weight .*not finite"):
            read_checkpoint(path)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.bool])
def test_what_are_no_floating_point_numbers_are_named(dtype, tmp_path):
    weights = uvit().state_dict()
    weights["norm.weight"] = torch.ones(32, dtype=dtype)
    with pytest.raises(InputError, match=rf"norm\.weight .*{str(dtype).removeprefix('torch.')}"):
        load_weights(uvit(), save(weights, tmp_path / "w.pth"))


def prefixed(prefix: str, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}


OPTIMIZER = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-4}]}
LAYOUTS = {
    # what the file holds of two networks, and the entries that --weights ema and raw take
    "DiT": (
        lambda ema, raw: {"model": raw.state_dict(), "ema": ema.state_dict(), "opt": OPTIMIZER, "args": None},
        *("ema", "model"),
    ),
    "EMA wrapper": (
        lambda ema, raw: {
            **prefixed("ema_model.", ema),
            **prefixed("online_model.", raw),
            **{"initted": torch.tensor(True), "step": torch.tensor(7)},
        },
        *("ema_model", "online_model"),
    ),
    "Lightning": (
        lambda ema, raw: {
            "epoch": 3,
            "state_dict": prefixed("net.", raw) | prefixed("net_ema.module.", ema) | {"betas": torch.ones(4)},
            "optimizer_states": [OPTIMIZER],
        },
        *("state_dict.net_ema", "state_dict.net"),
    ),
}


@pytest.mark.parametrize("weights", ["ema", "raw"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_of_several_entries_the_one_that_fits_is_taken_and_named(layout, weights, tmp_path, caplog):
    make, *entries = LAYOUTS[layout]
    ema, raw, target = uvit(), uvit(), uvit()
    path = save(make(ema, raw), tmp_path / "several.pth")
    load_weights(target, path, weights)
    assert same(target, ema if weights == "ema" else raw)
    assert f"several.pth: using the entry {entries[weights == 'raw']}, which fits" in caplog.text


def test_an_entry_of_safetensors(tmp_path, caplog):
    source, target = uvit(), uvit()
    load_weights(target, save(prefixed("ema_model.module.", source), tmp_path / "w.safetensors"))
    assert same(source, target) and "using the entry ema_model," in caplog.text


def test_where_there_are_raw_weights_alone_they_are_the_ones(tmp_path):
    source, target = uvit(), uvit()
    path = save({"state_dict": source.state_dict(), "epoch": 3}, tmp_path / "w.pth")
    for weights in ("ema", "raw"):
        load_weights(target, path, weights)
        assert same(source, target)


def test_averaged_weights_alone_are_not_raw_ones(tmp_path):
    path = save({"ema": uvit().state_dict()}, tmp_path / "w.pth")
    with pytest.raises(InputError, match="only averaged weights"):
        load_weights(uvit(), path, "raw")


def test_entries_that_fit_equally_well_are_named(tmp_path):
    path = save({"student": uvit().state_dict(), "teacher": uvit().state_dict()}, tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"several of its entries fit .*\(student, teacher\)"):
        load_weights(uvit(), path)


def test_a_network_beside_a_wrapped_one_is_not_mixed_with_it(tmp_path, caplog):
    """Without the wrapper's prefix both have the same names: neither may replace the other without a word."""
    plain, wrapped, target = uvit(), uvit(), uvit()
    load_weights(target, save(plain.state_dict() | prefixed("module.", wrapped), tmp_path / "w.pth"))
    assert same(target, wrapped) and "using the entry module," in caplog.text
    both = prefixed("_orig_mod.", plain) | prefixed("module.", wrapped)
    with pytest.raises(InputError, match=r"several of its entries fit .*\(_orig_mod, module\)"):
        load_weights(uvit(), save(both, tmp_path / "w.pth"))


def test_where_no_entry_fits_they_are_all_named(tmp_path):
    deeper = perturbed(UViT(**TINY, depth=5)).state_dict()
    path = save({"model": {"x": torch.ones(1)}, "ema": deeper, "opt": OPTIMIZER, "args": None}, tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"do not fit .* unexpected .*in its entry ema; .*args, ema, model, opt"):
        load_weights(uvit(), path)
    with pytest.raises(InputError, match=r"no state dict of tensors, only epoch, lr"):
        load_weights(uvit(), save({"lr": 0.1, "epoch": 3}, tmp_path / "w.pth"))


def test_entries_that_hold_one_another_stay_small(tmp_path):
    item = {"a": torch.zeros(1)}
    for _ in range(5):
        item = {f"{n}": item for n in range(200)}
    with pytest.raises(InputError, match="more than 200,000 names"):
        load_weights(uvit(), save(item, tmp_path / "w.pth"))
    item = {"a": torch.zeros(1)}
    item["self"] = item
    with pytest.raises(InputError, match=r"w\.pth"):
        load_weights(uvit(), save(item, tmp_path / "w.pth"))


@pytest.mark.parametrize(
    "about",
    [
        {"format": "pt"},
        {"step": "1.5e5"},
        {"step": "9" * 10_000, "weights": "ema"},
        {"config": "hidden_size: 64", "weights": "final"},
        {"config": "[" * 100_000},
        {"config": '{"architectures": ["UNet"], "model_params": {"depth": "deep"}}', "step": "abc"},
    ],
)
def test_metadata_of_other_projects_is_not_read(about, tmp_path):
    source, target = uvit(), uvit()
    save_file(source.state_dict(), tmp_path / "w.safetensors", about)
    assert read_weights(tmp_path / "w.safetensors")[1:4] == (None, "unknown", None)
    load_weights(target, tmp_path / "w.safetensors", "raw")
    assert same(source, target)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs on Windows")
@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_what_is_no_file_is_not_waited_for(name, tmp_path):
    os.mkfifo(tmp_path / name)
    with pytest.raises(InputError, match=f"{name}: is a pipe or device"):
        load_weights(uvit(), tmp_path / name)
    assert step_of(tmp_path / name) is None
    (tmp_path / "zero.pth").symlink_to("/dev/zero")
    with pytest.raises(InputError, match=r"zero\.pth: is a pipe or device"):
        load_weights(uvit(), tmp_path / "zero.pth")
