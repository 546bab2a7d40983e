from __future__ import annotations

import pytest
import torch

from common import devices
from common.errors import InputError

CPU = torch.device("cpu")


@pytest.mark.parametrize(("there", "want"), [(True, "bf16"), (False, "fp32")])
def test_bf16_is_taken_where_the_hardware_has_it(monkeypatch, there, want):
    monkeypatch.setattr(devices, "in_hardware", lambda precision, device: there)
    assert devices.pick_precision(None, CPU) == want
    assert devices.pick_precision("fp32", CPU) == "fp32"


def test_fp16_on_a_cpu_without_it_is_refused_and_bf16_is_not(monkeypatch):
    monkeypatch.setattr(devices, "in_hardware", lambda precision, device: False)
    with pytest.raises(InputError, match=r"fp16.*bf16 or fp32"):
        devices.pick_precision("fp16", CPU)
    assert devices.pick_precision("bf16", CPU) == "bf16"
    assert devices.pick_precision("fp16", torch.device("mps")) == "fp16"


@pytest.mark.parametrize(
    ("machine", "has", "want"),
    [
        ("x86_64", set(), (False, False)),
        ("x86_64", {"_is_avx512_bf16_supported"}, (True, False)),
        ("x86_64", {"_is_amx_tile_supported", "_is_amx_fp16_supported"}, (True, True)),
    ],
)
def test_what_the_instruction_set_offers(monkeypatch, machine, has, want):
    monkeypatch.setattr(devices.platform, "machine", lambda: machine)
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_amx_fp16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name in has, raising=False)
    assert tuple(devices.in_hardware(precision, CPU) for precision in ("bf16", "fp16")) == want
    assert devices.in_hardware("fp32", CPU)


def test_a_compiler_is_looked_for(monkeypatch):
    monkeypatch.setattr(devices.shutil, "which", lambda name: None)
    with pytest.raises(InputError, match=r"--compile.*C\+\+"):
        devices.check_compiler(CPU)
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="triton"):
        devices.check_compiler(torch.device("cuda"))


@pytest.mark.parametrize("index", ["1", "2", "9" * 400, "9" * 5000])
def test_a_gpu_that_is_not_there(monkeypatch, index):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match="this machine has 1 such devices"):
        devices.pick_device(f"cuda:{index}")


def test_the_peak_of_a_process_covers_what_it_held():
    before = devices.peak_memory(torch.device("cpu"))
    held = torch.ones(2**26)  # 256 MiB
    assert devices.peak_memory(torch.device("cpu")) >= max(before, held.nbytes)
    assert [devices.in_units(size) for size in (350 * 2**20, 5 * 2**28)] == ["350 MiB", "1.25 GiB"]
