"""calibrate.py, and sampler.py --t_switch auto."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import calibrate
import main as main_script
import sampler
from generation.folder import BatchUnderWay, SampleFolder
from generation.stages import read_stages
from tests.conftest import TINY_FLAGS, TRAINING_FLAGS

QUICK = ["--dataset", "digits", "--n_images", 12, "--batch_size", 4, "--device", "cpu", "--quiet"]
EXTRACTOR = ["--feature_extractor", "experiments/digits_classifier.pt"]


@pytest.fixture
def pair(shallow, full):
    return ["--checkpoint_path", shallow, full, *QUICK]


@pytest.fixture(scope="module")
def middle(runs):
    """A third network, which knows the upper half of the timesteps."""
    flags = [*TINY_FLAGS, *TRAINING_FLAGS, "--n_steps", "2", "--log_path", str(runs), "--t_min", "10"]
    main_script.main([*flags, "--model", "uvit", "--depth", "3", "--exp_name", "middle"])
    return runs / "middle" / "digits_uvit_last.pth"


def contents(path):
    return json.loads(path.with_suffix(".json").read_text())


@pytest.mark.slow
def test_two_networks(pair, tmp_path, run_quietly):
    out = tmp_path / "new" / "c.yaml"
    said = run_quietly(calibrate.main, [*pair, "--speedup", 1, "--output", out])
    assert "chosen: t_switch 19" in said and "--speedup 1" in said and "nats/dim" in said and "excess" in said
    found, plan = contents(out), read_stages(out)
    assert plan.t_switch == found["chosen"]["t_switch"] == 19
    assert plan.calibration["solver"] == "ddpm" and plan.calibration["steps"] == 20
    assert [option["t_switch"] for option in found["options"]] == list(
        range(19, -1, -1)
    )  # -1: the last step is the full one's
    divergence = [option["divergence"] for option in found["options"]]
    assert divergence == sorted(divergence) and divergence[0] == 0
    assert out.with_suffix(".png").stat().st_size > 10_000
    assert all(len(network[name]["mean"]) == 20 for network in found["networks"] for name in ("error", "distance"))
    assert found["networks"][1]["distance"]["mean"] == [0.0] * 20


@pytest.mark.slow
def test_the_same_seed_measures_the_same(pair, tmp_path, run_quietly):
    measured = []
    for name, seed, size in (("a", 1, 4), ("b", 1, 5), ("c", 2, 4)):
        flags = [*pair, "--budget", 1e9, "--seed", seed, "--batch_size", size, "--output", tmp_path / f"{name}.yaml"]
        run_quietly(calibrate.main, flags)
        measured.append(contents(tmp_path / f"{name}.yaml")["networks"][0]["error"]["mean"])
    np.testing.assert_allclose(measured[0], measured[1], rtol=1e-5)
    assert not np.allclose(measured[0], measured[2], rtol=1e-3)


@pytest.mark.parametrize("solver", ["ddim", "dpmsolver++", "unipc"])
def test_deterministic_solvers_speak_of_shifts(solver, pair, tmp_path, run_quietly):
    out = tmp_path / "c.yaml"
    said = run_quietly(calibrate.main, [*pair, "--solver", solver, "--steps", 5, "--budget", 1e9, "--output", out])
    assert "shift^2" in said and "nats" not in said
    found = contents(out)
    assert found["measure"] == "squared shift" and found["chosen"]["t_switch"] == -1
    (alone,) = read_stages(out).stages
    assert alone.t_max == 19 and alone.t_min == 0


@pytest.mark.slow
def test_without_noise_the_knee_is_that_of_ddpm(pair, tmp_path, run_quietly):
    """Both say the same, with the same images, noise and steps; but without noise the last step is open to all."""
    chosen = []
    for solver in ("ddpm", "ddim"):
        out = tmp_path / f"{solver}.yaml"
        run_quietly(calibrate.main, [*pair, "--solver", solver, "--steps", 20, "--seed", 3, "--output", out])
        chosen.append(contents(out))
    ancestral, deterministic = chosen
    assert (ancestral["rule"], deterministic["rule"]) == ("knee", "knee of ddpm")
    assert ancestral["chosen"]["t_switch"] == deterministic["chosen"]["t_switch"]
    assert deterministic["measure"] == "squared shift"
    switches = [[option["t_switch"] for option in found["options"]] for found in chosen]
    assert switches == [list(range(19, -1, -1)), list(range(19, -2, -1))]
    assert deterministic["chosen"]["divergence"] != ancestral["chosen"]["divergence"]


def test_the_stages_sample(pair, shallow, full, tmp_path, run_quietly):
    """What calibrate.py writes sampler.py reads, and it makes what the plain number makes."""
    out = tmp_path / "c.yaml"
    run_quietly(calibrate.main, [*pair, "--steps", 5, "--budget", 1e9, "--output", out])
    t_switch = read_stages(out).t_switch
    sampling = ["--steps", 5, "--n_samples", 2, "--device", "cpu", "--quiet"]
    run_quietly(sampler.main, ["--stages", out, *sampling, "--output_folder", tmp_path / "a"])
    two = ["--checkpoint_path", shallow, "--checkpoint_path_late", full, "--t_switch", t_switch]
    run_quietly(sampler.main, [*two, *sampling, "--output_folder", tmp_path / "b"])
    assert 0 <= t_switch < 19
    assert (tmp_path / "a" / "000001.png").read_bytes() == (tmp_path / "b" / "000001.png").read_bytes()


@pytest.fixture
def few(shallow, tmp_path):
    """The shallow network, as if it had been trained only on t = 15..19."""
    content = torch.load(shallow, weights_only=True)
    torch.save(content | {"config": content["config"] | {"t_min": 15, "t_max": 19}}, tmp_path / "few.pth")
    return tmp_path / "few.pth"


@pytest.mark.parametrize("free", [[], ["--free"]])
@pytest.mark.slow
def test_three_networks(free, few, middle, full, tmp_path, run_quietly):
    """Each where it was trained: with no limit to the divergence the cheapest that knows a timestep runs there.

    What is scored is that, and the full network alone.
    """
    out = tmp_path / "c.yaml"
    networks = ["--checkpoint_path", few, middle, full]
    verify = ["--verify", 2, "--n_samples", 4, *EXTRACTOR]
    said = run_quietly(calibrate.main, [*networks, *QUICK, "--budget", 1e9, *free, *verify, "--output", out])
    assert "1 block " in said and "3 blocks" in said and "5 blocks" in said and "nan" not in said
    assert "the last step adds no noise, so the full network runs there\n" in said
    stages = [(stage.checkpoint_path.parent.name, stage.t_min, stage.t_max) for stage in read_stages(out).stages]
    assert stages == [(few.parent.name, 15, 19), ("middle", 10, 14), ("full", 0, 9)]
    found = contents(out)
    (alone, chosen) = [option for option in found["options"] if "scores" in option]
    assert alone["steps_of_each"] == [0, 0, 20] and chosen["steps_of_each"] == [5, 5, 10]
    assert {key: chosen[key] for key in found["chosen"]} == found["chosen"]
    sampling = ["--n_samples", 4, "--batch_size", 4, "--device", "cpu", "--quiet"]
    run_quietly(sampler.main, ["--stages", out, *sampling, "--output_folder", tmp_path / "s"])
    of_chosen = [images_of(path) for path in (tmp_path / "c_verify").glob("*_seed-0")]
    assert images_of(tmp_path / "s") in of_chosen and len(of_chosen) == 2


@pytest.mark.slow
def test_verified(pair, tmp_path, run_quietly, fails):
    out = tmp_path / "c.yaml"
    verify = ["--verify", 3, "--n_samples", 4, "--sample_seeds", 0, 1, *EXTRACTOR]
    said = run_quietly(calibrate.main, [*pair, "--steps", 4, "--speedup", 1, *verify, "--output", out])
    assert "score" in said
    scored = [option for option in contents(out)["options"] if "scores" in option]
    assert len(scored) == 3 and all(len(option["scores"]) == 2 for option in scored)
    assert scored[0]["t_switch"] == 19
    folder = tmp_path / "c_verify"
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("0*.png")}
    assert len(before) == 3 * 2 * 4
    run_quietly(calibrate.main, [*pair, "--steps", 4, "--speedup", 1, *verify, "--output", out])
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("0*.png")} == before, "what is there is taken"
    other = [*pair, "--steps", 4, "--speedup", 1, *verify[:2], "--n_samples", 2, *EXTRACTOR, "--output", out]
    fails(calibrate.main, other, "more than --n_samples 2", "give --overwrite")
    reference = ["--reference", folder / "t_switch-19_seed-0"]
    run_quietly(calibrate.main, [*other, "--overwrite", *reference])
    about = json.loads((folder / "t_switch-19_seed-0" / "report" / "metrics.json").read_text())
    assert about["fid"] == pytest.approx(0, abs=1e-3) and about["reference"]["n_reference"] == 2


@pytest.mark.slow
def test_flags_describe_the_first_network(shallow, full, tmp_path, run_quietly):
    """To its samplers too: to the one that has the full network alone as well, which carries its description."""
    content = torch.load(shallow, weights_only=True)
    torch.save(content["model"] | content["ema"], tmp_path / "bare.pth")
    flags = [*QUICK, "--steps", 4, "--speedup", 1, "--verify", 2, "--n_samples", 4, *EXTRACTOR, "--precision", "fp32"]
    described = ["--checkpoint_path", tmp_path / "bare.pth", full, *TINY_FLAGS, "--depth", 1, "--num_timesteps", 20]
    for name, networks in (("flags", described), ("carried", ["--checkpoint_path", shallow, full])):
        run_quietly(calibrate.main, [*networks, *flags, "--output", tmp_path / f"{name}.yaml"])
    one, other = (contents(tmp_path / f"{name}.yaml")["options"] for name in ("flags", "carried"))
    keys = ("t_switch", "steps_of_each", "divergence", "scores")
    assert [{k: o[k] for k in keys if k in o} for o in one] == [{k: o[k] for k in keys if k in o} for o in other]
    assert sum("scores" in option for option in one) == 2


@pytest.mark.slow
def test_classes_and_guidance(runs, tmp_path, run_quietly, fails):
    no_class = runs / "no_class" / "digits_uvit_last.pth"
    flags = ["--checkpoint_path", no_class, no_class, *QUICK, "--steps", 4, "--budget", 1]
    run_quietly(calibrate.main, [*flags, "--output", tmp_path / "plain.yaml"])
    run_quietly(calibrate.main, [*flags, "--guidance_scale", 1, "--output", tmp_path / "guided.yaml"])
    plain, guided = (
        contents(tmp_path / f"{name}.yaml")["networks"][0]["error"]["mean"] for name in ("plain", "guided")
    )
    assert not np.allclose(plain, guided)
    scales = [[s.guidance_scale for s in read_stages(tmp_path / f"{n}.yaml").stages] for n in ("plain", "guided")]
    assert set(scales[0]) == {None} and set(scales[1]) == {1}, "it is sampled as it was measured"
    classes = runs / "classes" / "digits_uvit_last.pth"
    flags = ["--checkpoint_path", classes, classes, *QUICK, "--guidance_scale", 1, "--output", tmp_path / "x.yaml"]
    fails(calibrate.main, flags, "--guidance_scale 1", "no class")


@pytest.mark.slow
def test_refusals(pair, shallow, middle, full, runs, tmp_path, fails):
    out = ["--output", tmp_path / "c.yaml"]
    fails(calibrate.main, ["--checkpoint_path", full, *QUICK, *out], "two networks or more")
    classes = runs / "classes" / "digits_uvit_last.pth"
    fails(calibrate.main, ["--checkpoint_path", classes, full, *QUICK, *out], "num_classes (10 and -1)")
    fails(calibrate.main, ["--checkpoint_path", shallow, middle, *QUICK, *out], "trained only on t = 10..19")
    fails(calibrate.main, ["--checkpoint_path", full, shallow, *QUICK, *out], "from small to large")
    fails(calibrate.main, [*pair, *out, "--n_images", 5000], "--n_images 5000: the dataset has 1797")
    fails(calibrate.main, [*pair, *out, "--steps", 21], "--steps 21")
    fails(calibrate.main, [*pair, *out, "--speedup", 500], "--speedup 500", "the largest speed-up of these networks is")
    fails(calibrate.main, [*pair, *out, "--speedup", 2, "--budget", 1], "--speedup and --budget are two rules")
    fails(calibrate.main, [*pair, *out, "--n_samples", 5], "--n_samples needs --verify")
    fails(
        calibrate.main, [*pair, *out, "--verify", 2, "--sample_seeds", 1, 1], "--sample_seeds: give each seed only once"
    )
    fails(calibrate.main, [*pair, *out, "--config_path", "none"], "one for each of the 2 networks")
    fails(calibrate.main, [*pair, "--output", tmp_path / "c.json"], "wanted a .yaml")
    fails(calibrate.main, [*pair, *out, "--eta", 1], "--eta belongs to --solver ddim")
    (tmp_path / "c.png").write_bytes(b"mine")
    fails(calibrate.main, [*pair, *out], "c.png exists already and is not from calibrate.py")
    assert (tmp_path / "c.png").read_bytes() == b"mine"
    assert [path.name for path in tmp_path.iterdir()] == ["c.png"]
    (tmp_path / "networks.yml").write_text("mine")
    fails(calibrate.main, [*pair, "--output", tmp_path / "networks.yml"], "networks.yml exists already")
    assert (tmp_path / "networks.yml").read_text() == "mine"


def recorded_switch(folder):
    """The full network runs below all that the first stage has."""
    recorded = json.loads((folder / "report" / "run.json").read_text())["stages"]
    assert [stage["network"] for stage in recorded] == [0, 1]
    return recorded[0]["t_min"] - 1


def images_of(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


@pytest.mark.slow
def test_auto(shallow, full, tmp_path, run_quietly, monkeypatch):
    """It samples with the switch it found, keeps what it found, and does not choose anew when it goes on."""
    auto = ["--checkpoint_path", shallow, "--checkpoint_path_late", full, "--t_switch", "auto"]
    auto += ["--dataset", "digits", "--n_images", 12, "--budget", 1e9, "--steps", 5, "--batch_size", 1]
    flags = ["--device", "cpu", "--quiet", "--output_folder", tmp_path / "a"]
    said = run_quietly(sampler.main, [*auto, "--n_samples", 2, *flags])
    assert "chosen: t_switch" in said
    report = tmp_path / "a" / "report"
    found = read_stages(report / "calibration.yaml")
    assert (report / "calibration.png").exists() and (report / "calibration.json").exists()
    t_switch = recorded_switch(tmp_path / "a")
    assert t_switch == found.t_switch and t_switch < 19
    plain = ["--checkpoint_path", shallow, "--checkpoint_path_late", full, "--t_switch", t_switch, "--steps", 5]
    run_quietly(sampler.main, [*plain, "--batch_size", 1, "--n_samples", 3, *flags[:-1], tmp_path / "b"])

    def refuse(*args, **more):
        raise AssertionError("it measured again")

    monkeypatch.setattr("calibration.run.calibrate", refuse)
    said = run_quietly(sampler.main, [*auto, "--n_samples", 3, *flags])
    assert f"t_switch {t_switch}, as it was chosen when this run began" in said and "2 of them from before" in said
    assert images_of(tmp_path / "a") == images_of(tmp_path / "b")
    assert (report / "calibration.yaml").exists()


@pytest.mark.slow
def test_auto_that_was_stopped_before_its_first_batch(shallow, full, tmp_path, run_quietly, fails, monkeypatch):
    """With images there the switch stays and so does what was measured; without any it is chosen anew."""
    auto = ["--checkpoint_path", shallow, "--checkpoint_path_late", full, "--t_switch", "auto", "--dataset", "digits"]
    auto += ["--n_images", 12, "--steps", 5, "--n_samples", 2, "--device", "cpu", "--quiet"]
    auto += ["--output_folder", tmp_path / "s"]
    report = tmp_path / "s" / "report"

    def stop(*_):
        raise KeyboardInterrupt

    # Before the first image, and after all of them.
    for cls, method, budget in ((BatchUnderWay, "sampling", 0), (SampleFolder, "finished", 1e9)):
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(cls, method, stop)
            sampler.main([str(arg) for arg in [*auto, "--budget", budget]])
    (batch,) = (report / "batches").iterdir()
    batch.unlink()  # as if it had not been finished
    assert recorded_switch(tmp_path / "s") == 3, "its second attempt chose anew"
    fails(sampler.main, [*auto, "--budget", 0], "another run", "budget (1000000000.0 and 0.0)")
    said = run_quietly(sampler.main, [*auto, "--budget", 1e9])
    assert "t_switch 3, as it was chosen when this run began" in said
    assert read_stages(report / "calibration.yaml").t_switch == 3
    (report / "run.json").write_text("{}")
    fails(sampler.main, [*auto, "--budget", 1e9], "stages are not recorded", "--overwrite")


def test_auto_has_to_be_asked_for_and_needs_images(shallow, full, tmp_path, fails, monkeypatch):
    two = ["--checkpoint_path", shallow, "--checkpoint_path_late", full, "--output_folder", tmp_path / "s"]
    fails(sampler.main, [*two, "--t_switch", "auto"], "give --dataset")
    fails(sampler.main, [*two, "--t_switch", "often"], "--t_switch", "often")
    fails(sampler.main, [*two, "--t_switch", 5, "--dataset", "digits"], "--dataset belongs to --t_switch auto")
    fails(sampler.main, [*two, "--t_switch", 5, "--speedup", 2], "--speedup belongs to --t_switch auto")
    auto = [*two, "--t_switch", "auto", "--dataset", "digits"]
    fails(sampler.main, [*auto, "--reuse_every", 2], "--t_switch auto", "--reuse_every")
    fails(sampler.main, [*auto, "--speedup", 500, "--n_images", 4, "--steps", 3], "--speedup 500")
    assert not (tmp_path / "s").exists()
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "mine.txt").touch()
    with monkeypatch.context() as patch:
        patch.setattr("calibration.automatic.calibrate", pytest.fail)
        fails(sampler.main, auto, "mine.txt, which is not a sample")
        fails(sampler.main, [*auto, "--class_id", 3], "unconditional")


@pytest.mark.slow
def test_auto_of_several_processes(shallow, full, tmp_path, torchrun, run_quietly):
    auto = ["--checkpoint_path", shallow, "--checkpoint_path_late", full, "--t_switch", "auto", "--steps", 5]
    auto += ["--dataset", "digits", "--n_images", 12, "--budget", 1e9, "--n_samples", 4, "--batch_size", 2]
    auto += ["--device", "cpu", "--quiet"]
    ended = torchrun("sampler.py", [*auto, "--output_folder", tmp_path / "two"], 2)
    assert ended.returncode == 0, ended.stderr
    run_quietly(sampler.main, [*auto, "--output_folder", tmp_path / "one"])
    assert torch.equal(*(torch.tensor([len(images_of(tmp_path / name))]) for name in ("one", "two")))
    assert images_of(tmp_path / "one") == images_of(tmp_path / "two")
