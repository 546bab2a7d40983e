"""Networks whose weights are in memory only while they run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from common.errors import InputError
from models.inference import BackboneDenoiser
from models.loading import load_network
from models.offload import on_host, session_of
from models.uvit import UViT
from tests.conftest import TINY, perturbed

CPU = torch.device("cpu")
MAPS = Path("/proc/self/maps")  # the parts of files in the memory of this process
TIMES = {t: float(t) for t in (999, 998, 0)}


@pytest.fixture
def uvit() -> UViT:
    return perturbed(UViT(**TINY, depth=3)).eval().requires_grad_(False)


def stored(state_dict, path):
    """An empty network of this file."""
    (save_file if path.suffix == ".safetensors" else torch.save)(state_dict, path)
    return load_network(path, {"model_params": TINY | {"depth": 3}}, UViT, offload=True)


def is_empty(network) -> bool:
    return all(weight.is_meta for weight in network.state_dict().values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.pth", torch.float32), ("a.safetensors", torch.float32), ("a.pth", torch.float64), ("b.pth", torch.bfloat16)],
)
@torch.inference_mode()
def test_it_is_the_network_in_its_sessions_and_empty_between(uvit, tmp_path, name, kind, dtype):
    weights = {key: value.to(kind) for key, value in uvit.state_dict().items()}
    uvit.load_state_dict(weights)
    network = stored(weights, tmp_path / name)
    assert is_empty(network.module)
    with on_host(network.module, network.stored):
        denoiser = BackboneDenoiser(network.module, TIMES, dtype, CPU)
    session = session_of(network.module, network.stored, dtype, CPU)
    whole, x = BackboneDenoiser(uvit, TIMES, dtype, CPU), torch.randn(2, 1, 8, 8)
    for t in TIMES:
        assert is_empty(network.module)
        with session():
            assert {weight.dtype for weight in network.module.parameters()} == {dtype}
            torch.testing.assert_close(denoiser(x, t, None), whole(x, t, None), rtol=0, atol=0)
    with pytest.raises(MemoryError), session():
        raise MemoryError
    assert is_empty(network.module)


def test_weights_lie_in_memory_as_torch_allocates_them(uvit, tmp_path):
    """In a safetensors file, and in transposed tensors, they do not."""
    weights = uvit.state_dict()
    turned = {key: value.t().contiguous().t() if value.ndim == 2 else value for key, value in weights.items()}
    for name, content in (("a.safetensors", weights), ("a.pth", turned)):
        read = stored(content, tmp_path / name).stored()
        assert all(weight.is_contiguous() and weight.data_ptr() % 64 == 0 for weight in read.values())
        assert all(torch.equal(weight, weights[key]) for key, weight in read.items())


@pytest.mark.skipif(not MAPS.exists(), reason="Linux alone tells")
def test_a_checkpoint_is_mapped_and_not_read(uvit, tmp_path):
    """Nothing of it is in memory but what was looked at."""
    mapped = stored(uvit.state_dict(), tmp_path / "a.pth").stored()
    regions = [line.split() for line in MAPS.read_text().splitlines() if line.endswith("a.pth")]
    bounds = [tuple(int(end, 16) for end in region[0].split("-")) for region in regions]
    for weight in mapped.values():
        assert any(low <= weight.data_ptr() < high for low, high in bounds)


def change(path):
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    path.write_bytes(content)
    os.utime(path, ns=(0, 0))


def replace(path):
    content = path.read_bytes()
    path.rename(path.with_name("old"))
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [lambda path: path.unlink(), change, replace], ids=["removed", "changed", "replaced"])
@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_a_file_that_does_not_stay_as_it_is(uvit, tmp_path, name, harm):
    network = stored(uvit.state_dict(), tmp_path / name)
    session = session_of(network.module, network.stored, torch.float32, CPU)
    with session():
        pass
    harm(tmp_path / name)
    with pytest.raises(InputError, match=f"{name} was changed or removed"), session():
        pass
    assert is_empty(network.module)


@pytest.mark.parametrize("chosen", ["ema", "raw"])
def test_the_chosen_weights_are_read_again(uvit, tmp_path, chosen, caplog):
    """And which entry of a file they are is said once."""
    raw, averaged = uvit.state_dict(), {key: value + 1 for key, value in uvit.state_dict().items()}
    torch.save({"net": raw, "net_ema": averaged}, tmp_path / "a.pth")
    network = load_network(
        tmp_path / "a.pth", {"model_params": TINY | {"depth": 3}}, UViT, weights=chosen, offload=True
    )
    said = len(caplog.records)
    read = network.stored()
    wanted = averaged if chosen == "ema" else raw
    assert read.keys() == wanted.keys() and all(torch.equal(read[key], wanted[key]) for key in read)
    assert said and len(caplog.records) == said


def test_on_cuda_they_come_from_the_host(uvit, tmp_path, monkeypatch):
    """There is no second device here: copies stand for it. The file is read once, and its later fate is no matter."""
    network = stored(uvit.state_dict(), tmp_path / "a.pth")
    pinned, to = [], torch.Tensor.to

    def pin(weight):
        pinned.append(weight.clone())
        return pinned[-1]

    def copied(weight, device, dtype=None, **more):
        there = isinstance(device, torch.device) and device.type == "cuda"
        return weight.clone() if there else to(weight, device, **more)

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "to", copied)
    session = session_of(network.module, network.stored, torch.bfloat16, torch.device("cuda"))
    (tmp_path / "a.pth").unlink()
    assert len(pinned) == len(uvit.state_dict()) and {weight.dtype for weight in pinned} == {torch.bfloat16}
    for _ in range(2):
        with session():
            for name, weight in network.module.state_dict().items():
                assert torch.equal(weight, to(uvit.state_dict()[name], torch.bfloat16))
                assert weight.data_ptr() not in {host.data_ptr() for host in pinned}
        assert is_empty(network.module)
