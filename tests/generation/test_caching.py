"""sampler.py --reuse_every: what is made, what is counted, what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml

import sampler
from models import UViT
from models.flops import backbone_flops
from tests.conftest import TINY
from tests.folders import equal

FLAGS = ["--device", "cpu", "--quiet", "--batch_size", 2]


@pytest.fixture
def one(full):
    return ["--checkpoint_path", full, *FLAGS]


@pytest.fixture
def duo(full, shallow):
    return ["--checkpoint_path", shallow, "--checkpoint_path_late", full, "--t_switch", 9, *FLAGS]


@pytest.mark.parametrize("pair", [False, True])
def test_interval_1_is_none(pair, one, duo, make, tmp_path):
    argv = duo if pair else one
    none, interval_1 = make("none", argv), make("one", [*argv, "--reuse_every", 1])
    assert equal(none[0], interval_1[0])
    assert none[1]["backbones"] == interval_1[1]["backbones"]
    recorded = [json.loads((tmp_path / name / "report" / "run.json").read_text()) for name in ("none", "one")]
    assert recorded[0] == recorded[1]


def test_what_is_made_and_what_is_counted(one, make):
    none, _ = make("none", one)
    whole, around = (backbone_flops(UViT(**TINY, depth=5), outer) for outer in (None, 2))
    for interval, computed in ((2, 10), (3, 7), (50, 1)):
        images, about = make(str(interval), [*one, "--reuse_every", interval, "--reuse_outer", 2])
        assert not equal(images, none)
        (backbone,) = about["backbones"]
        assert backbone["timesteps"] == 20 and backbone["timesteps_reusing"] == 20 - computed
        assert backbone["calls"] == 20
        assert about["network_flops_per_image"] == computed * whole + (20 - computed) * around
        assert backbone["flops_per_image_call"] == pytest.approx(about["network_flops_per_image"] / 20)


def test_flops_are_those_of_the_run(runs, make, counted):
    """Two stages under different guidance, an interval that does not divide the steps: counted as they happen."""
    network = runs / "no_class" / "digits_uvit_last.pth"
    argv = ["--checkpoint_path", network, "--checkpoint_path_late", network, "--t_switch", 6, *FLAGS]
    _, about = make("s", [*argv, "--guidance_scale_late", 1, "--reuse_every", 3])
    assert counted == [2 * about["network_flops_per_image"]], "of two images"
    assert [b["timesteps_reusing"] for b in about["backbones"]] == [13 - 5, 7 - 3]


def test_a_network_without_a_middle_runs_whole(duo, shallow, make, tmp_path, fails):
    _, about = make("s", [*duo, "--reuse_every", 2])
    assert ["timesteps_reusing" in b for b in about["backbones"]] == [False, True]
    out = ["--output_folder", tmp_path / "x"]
    alone = ["--checkpoint_path", shallow, *FLAGS, *out, "--reuse_every", 2]
    fails(sampler.main, alone, "reuse_every=2", "reuse_outer")
    fails(sampler.main, [*duo, *out, "--reuse_every", 2, "--reuse_outer", 3], "the 3 outermost", "the deepest has 5")
    fails(sampler.main, [*duo, *out, "--reuse_every", 2, "--t_switch", -1], "no network that runs")
    fails(sampler.main, [*duo, *out, "--reuse_outer", 1], "reuse_outer", "reuse_every of 2 or more")
    fails(sampler.main, [*duo, *out, "--reuse_every", 0], "--reuse_every")
    assert not (tmp_path / "x").exists()


def test_batches_and_a_run_that_goes_on(duo, make, tmp_path, fails):
    """Warm-up, a first batch and a last one of another size: each begins with what it computes itself."""
    cached = [*duo, "--reuse_every", 3]
    whole, _ = make("whole", [*cached, "--n_samples", 5])
    make("parts", [*cached, "--n_samples", 2])
    assert equal(make("parts", [*cached, "--n_samples", 5])[0], whole)
    ones, _ = make("ones", [*cached, "--n_samples", 5, "--batch_size", 1])
    assert all(np.abs(ones[key].astype(int) - whole[key]).max() <= 1 for key in whole)
    flags = ["--n_samples", 6, "--output_folder", tmp_path / "parts"]
    fails(sampler.main, [*duo, "--reuse_every", 2, *flags], "another run", "reuse_every (3 and 2)")
    fails(sampler.main, [*cached, "--reuse_outer", 2, *flags], "another run", "reuse_outer (1 and 2)")
    fails(sampler.main, [*duo, *flags], "another run", "stages")


def test_a_network_that_comes_twice_begins_afresh(full, shallow, make, tmp_path):
    """Stages of 5, 10 and 5 steps: the deep one computes at 19, 16 and again at 4, 1."""
    stages = [(full, 15, 19), (shallow, 5, 14), (full, 0, 4)]
    listed = [{"checkpoint_path": str(file), "t_min": t_min, "t_max": t_max} for file, t_min, t_max in stages]
    (tmp_path / "s.yaml").write_text(yaml.safe_dump({"stages": listed}))
    _, about = make("s", ["--stages", tmp_path / "s.yaml", *FLAGS, "--reuse_every", 3])
    assert [b.get("timesteps_reusing") for b in about["backbones"]] == [6, None]
    whole, around = (backbone_flops(UViT(**TINY, depth=5), outer) for outer in (None, 1))
    assert about["backbones"][0]["flops_per_image"] == 4 * whole + 6 * around


def test_in_half_precision(one, make):
    flags = [*one, "--reuse_every", 2, "--precision"]
    fp32, bf16 = (np.stack(list(make(name, [*flags, name])[0].values())).astype(int) for name in ("fp32", "bf16"))
    assert 0 < np.abs(fp32 - bf16).mean() < 2.0, "of 255 levels, after twenty steps"
