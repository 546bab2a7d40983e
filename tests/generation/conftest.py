"""What tests of sampler.py share: a run in a folder of its own, and the FLOPs that it really has."""

from __future__ import annotations

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import diffusion.sampling
import sampler
from tests.folders import samples, statistics


@pytest.fixture
def make(tmp_path, run_quietly):
    """Runs sampler.py into a folder of that name. Returns its samples and its statistics."""

    def call(name, argv):
        run_quietly(sampler.main, [*argv, "--output_folder", tmp_path / name])
        return samples(tmp_path / name), statistics(tmp_path / name)

    return call


@pytest.fixture
def counted(monkeypatch):
    """FLOPs of each batch as torch counts them while it runs."""
    flops, run = [], diffusion.sampling.sample

    def counting(*args):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            images = run(*args)
        flops.append(counter.get_total_flops())
        return images

    monkeypatch.setattr(diffusion.sampling, "sample", counting)
    return flops
