"""sampler.py --stages: runs of one, two and three networks, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import yaml

import sampler
from models import UViT, loading
from models.flops import backbone_flops
from models.inference import BackboneDenoiser
from models.offload import StoredWeights
from tests.conftest import TINY, perturbed
from tests.folders import samples, statistics, timesteps_told

FLAGS = ["--device", "cpu", "--quiet", "--n_samples", 3, "--batch_size", 2]


@pytest.fixture
def middling(full, tmp_path):
    """A checkpoint of 3 blocks that was trained only on t = 5..14."""
    content = torch.load(full, weights_only=True)
    config = content["config"] | {"t_min": 5, "t_max": 14}
    config["model_params"] = content["config"]["model_params"] | {"depth": 3}
    weights = perturbed(UViT(**TINY, depth=3)).state_dict()
    torch.save(content | {"config": config, "model": weights, "ema": None}, tmp_path / "middling.pth")
    return tmp_path / "middling.pth"


@pytest.fixture
def stages(tmp_path):
    """Write a file of stages: (checkpoint, t_min, t_max, mapping of more keys) of each."""

    def write(*stages, **more):
        path = tmp_path / f"{len(list(tmp_path.glob('*.yaml')))}.yaml"
        listed = [
            {"checkpoint_path": str(file), "t_min": t_min, "t_max": t_max} | (rest[0] if rest else {})
            for file, t_min, t_max, *rest in stages
        ]
        path.write_text(yaml.safe_dump({"stages": listed} | more))
        return path

    return write


@pytest.fixture
def calls(monkeypatch):
    """[(blocks, t), ...] of all calls of networks."""
    made, call = [], BackboneDenoiser.__call__

    def recording(self, x_t, t, y):
        made.append((self.backbone.config.num_blocks, t))
        return call(self, x_t, t, y)

    monkeypatch.setattr(BackboneDenoiser, "__call__", recording)
    return made


@pytest.fixture
def same(tmp_path, run_quietly):
    """Two command lines make the same images, bit for bit. Returns the statistics of both."""

    def check(one, other):
        for name, argv in (("one", one), ("other", other)):
            run_quietly(sampler.main, [*argv, *FLAGS, "--output_folder", tmp_path / name])
        images = samples(tmp_path / "one"), samples(tmp_path / "other")
        assert images[0].keys() == images[1].keys() and len(images[0]) == 3
        assert all(np.array_equal(images[0][key], images[1][key]) for key in images[0])
        return statistics(tmp_path / "one"), statistics(tmp_path / "other")

    return check


@pytest.mark.parametrize("solver", [[], ["--solver", "unipc", "--steps", "6"]])
def test_one_network(solver, full, stages, same):
    stats = same(
        ["--stages", stages((full, 0, 19)), *solver],
        ["--checkpoint_path", full, *solver],
    )
    assert stats[0]["backbones"] == stats[1]["backbones"]


@pytest.mark.parametrize("solver", [[], ["--solver", "dpmsolver++", "--steps", "6"]])
def test_two_networks(solver, full, shallow, stages, same):
    stats = same(
        ["--stages", stages((shallow, 8, 19), (full, 0, 7), t_switch=7), *solver],
        ["--checkpoint_path", shallow, "--checkpoint_path_late", full, "--t_switch", 7, *solver],
    )
    assert [b["name"] for b in stats[0]["backbones"]] == ["shallow", "full"]
    assert stats[0]["backbones"] == stats[1]["backbones"]
    assert stats[0]["network_flops_per_image"] == stats[1]["network_flops_per_image"]


def test_guidance_of_a_stage(runs, stages, same):
    network = runs / "no_class" / "digits_uvit_last.pth"
    written = stages((network, 8, 19), (network, 0, 7, {"guidance_scale": 1.5}))
    guided = ["--checkpoint_path", network, "--checkpoint_path_late", network, "--t_switch", 7]
    stats = same(
        ["--stages", written, "--guidance_scale", 0.5],
        [*guided, "--guidance_scale", 0.5, "--guidance_scale_late", 1.5],
    )
    (backbone,) = stats[0]["backbones"]
    assert backbone["timesteps"] == 20 and backbone["calls"] == 40
    assert stats[0]["network_flops_per_image"] == stats[1]["network_flops_per_image"]
    assert stats[0]["stages"][1]["guidance_scale"] == 1.5


def test_three_networks_each_where_it_belongs(full, shallow, middling, stages, calls, tmp_path, run_quietly):
    written = stages((shallow, 15, 19), (middling, 5, 14), (full, 1, 4), (shallow, 0, 0))
    said = run_quietly(sampler.main, ["--stages", written, *FLAGS, "--n_samples", 2, "--output_folder", tmp_path / "s"])
    blocks = [1] * 5 + [3] * 10 + [5] * 4 + [1]
    assert calls[-20:] == list(zip(blocks, range(19, -1, -1), strict=True))
    assert timesteps_told(said) == {"network 1": 6, "network 2": 10, "network 3": 4}
    about = statistics(tmp_path / "s")
    assert [b["timesteps"] for b in about["backbones"]] == [6, 10, 4]
    assert [b["model_params"]["depth"] for b in about["backbones"]] == [1, 3, 5]
    flops = {depth: backbone_flops(UViT(**TINY, depth=depth)) for depth in (1, 3, 5)}
    assert about["network_flops_per_image"] == 6 * flops[1] + 10 * flops[3] + 4 * flops[5]
    assert about["network_flops_per_image"] == sum(b["flops_per_image"] for b in about["backbones"])


def test_a_network_that_never_runs_is_no_obstacle(full, middling, stages, tmp_path, run_quietly, caplog):
    """Four steps of 20 are 19, 14, 9, 4; nor was that network trained on its own."""
    flags = ["--solver", "ddim", "--steps", 4, *FLAGS, "--output_folder", tmp_path / "s"]
    run_quietly(sampler.main, ["--stages", stages((full, 19, 19), (middling, 15, 18), (full, 0, 14)), *flags])
    assert [b["timesteps"] for b in statistics(tmp_path / "s")["backbones"]] == [4, 0]
    (message,) = (record.getMessage() for record in caplog.records)
    assert f": stage 2 (network 2, {middling}) does not run" in message
    assert message.endswith("it contains none of the 4 timesteps, t = 19..4")


def test_what_decides_the_images_is_recorded(full, shallow, middling, stages, tmp_path, run_quietly, fails):
    one, other = (stages((shallow, t + 1, 19), (full, 0, t)) for t in (7, 8))
    flags = [*FLAGS, "--output_folder", tmp_path / "s"]
    run_quietly(sampler.main, ["--stages", one, *flags])
    before = samples(tmp_path / "s")
    fails(sampler.main, ["--stages", other, *flags], "another run", "stages.0.t_min (8 and 9)")
    again = stages((shallow, 8, 19), (full, 0, 7), calibration={"solver": "ddpm"})  # another file, the same stages
    run_quietly(sampler.main, ["--stages", again, *flags, "--n_samples", 5])
    after = samples(tmp_path / "s")
    assert len(after) == 5 and all(np.array_equal(after[key], before[key]) for key in before)


def test_the_record_of_a_run_holds_no_place_and_no_time(full, shallow, tmp_path, run_quietly):
    """Nothing in it but that on which images depend: a run may go on elsewhere, and at another speed."""
    pair = ["--checkpoint_path", shallow, "--checkpoint_path_late", full, "--t_switch", 7]
    run_quietly(sampler.main, [*pair, *FLAGS, "--output_folder", tmp_path / "s"])
    recorded = json.loads((tmp_path / "s" / "report" / "run.json").read_text())
    assert sorted(recorded) == sorted(
        [
            *("seed", "solver", "steps", "eta", "clip_x0", "class_id", "stages"),
            *("timesteps_save", "precision", "device", "autoencoder_sha256", "networks", "sampling_schedule"),
            *(
                "dataset",
                "crop",
                "n_images",
                "paths",
                "speedup",
                "seconds",
                "budget",
            ),  # of --t_switch auto, --plan auto
        ]
    )


def test_stages_for_other_sampling_are_noted(full, stages, tmp_path, run_quietly, caplog):
    made_for = {"solver": "ddim", "steps": 20}
    written = stages((full, 0, 19), calibration=made_for)
    run_quietly(sampler.main, ["--stages", written, *FLAGS, "--output_folder", tmp_path / "s"])
    (message,) = (record.getMessage() for record in caplog.records)
    assert "made for solver ddim, not ddpm" in message


def test_offloading_follows_the_stages(full, shallow, stages, tmp_path, run_quietly, monkeypatch):
    """Each network is read when its stage begins, and before that once for its time tokens; never are two in memory."""

    def read(self):
        assert all(weight.is_meta for network in denoisers for weight in network.parameters())
        asked.append(self.path)
        return StoredWeights.__call__(self)

    def remember(self, backbone, *args, **kwargs):
        denoisers.append(backbone)
        make(self, backbone, *args, **kwargs)

    asked, denoisers, make = [], [], BackboneDenoiser.__init__
    monkeypatch.setattr(BackboneDenoiser, "__init__", remember)
    monkeypatch.setattr(loading, "StoredWeights", type("Noting", (StoredWeights,), {"__call__": read}))
    written = stages((full, 15, 19), (shallow, 5, 14), (full, 0, 4))
    flags = [*FLAGS, "--offload", "--output_folder", tmp_path / "s"]
    run_quietly(sampler.main, ["--stages", written, *flags])
    assert asked == [full, shallow, *3 * [full, shallow, full]]  # warm-up, and two batches


class TestRefusals:
    def test_options_that_contradict_it(self, full, stages, tmp_path, fails):
        flags = ["--stages", stages((full, 0, 19)), "--output_folder", tmp_path / "s"]
        for more in (
            ["--checkpoint_path", full],
            ["--checkpoint_path_late", full],
            ["--config_path", full],
            ["--config_path_late", full],
            ["--t_switch", 3],
            ["--guidance_scale_late", 1],
        ):
            fails(sampler.main, [*flags, *more], more[0], "--stages")
        fails(sampler.main, flags[2:], "--checkpoint_path", "--stages")
        assert not (tmp_path / "s").exists()

    def test_stages_that_do_not_fit_the_networks(self, runs, full, shallow, middling, stages, tmp_path, fails):
        flags = ["--output_folder", tmp_path / "s", "--stages"]
        fails(sampler.main, [*flags, stages((shallow, 10, 18), (full, 0, 9))], "stages begin at t = 18", "at t = 19")
        classes = runs / "classes" / "digits_uvit_last.pth"
        three = stages((shallow, 10, 19), (classes, 5, 9), (full, 0, 4))
        fails(sampler.main, [*flags, three], "cannot run on one image", "num_classes (10 and -1)")
        outside = stages((shallow, 15, 19), (middling, 4, 14), (full, 0, 3))
        advice = f"let another network run there ({outside})"
        fails(sampler.main, [*flags, outside], "trained only on t = 5..14", "would run at t = 4;", advice)
        pair = ["--checkpoint_path", middling, "--checkpoint_path_late", full, "--logsnr_switch", 3]
        advice = "let another network run there (--logsnr_switch 3)"
        fails(sampler.main, [*pair, *flags[:2]], "trained only on t = 5..14", advice)
        assert not (tmp_path / "s").exists()

    def test_a_stage_outside_its_range_may_be_allowed(self, middling, stages, tmp_path, run_quietly):
        flags = [*FLAGS, "--allow_outside_range", "--output_folder", tmp_path / "s"]
        run_quietly(sampler.main, ["--stages", stages((middling, 0, 19)), *flags])
        assert len(samples(tmp_path / "s")) == 3

    def test_guidance_without_a_class_for_none(self, full, stages, tmp_path, fails):
        written = stages((full, 0, 19, {"guidance_scale": 2}))
        argv = ["--stages", written, "--output_folder", tmp_path / "s"]
        fails(sampler.main, argv, f"{written}: guidance_scale 2", "no class")
        assert not (tmp_path / "s").exists()

    def test_offloading_one_network(self, full, stages, tmp_path, fails):
        argv = ["--stages", stages((full, 0, 19)), "--offload", "--output_folder", tmp_path / "s"]
        fails(sampler.main, argv, "--offload", "names only one")
