"""sampler.py and eesampler.py, run on tiny networks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import eesampler
import fid
import generation.folder
import sampler
from models import UViT, load_weights
from tests.conftest import TINY, TINY_FLAGS
from tests.folders import samples, statistics, timesteps_told

DESCRIPTION = [*TINY_FLAGS, "--num_timesteps", 20]


@pytest.fixture
def duo(full, shallow):
    return ["--checkpoint_path", shallow, "--checkpoint_path_late", full, "--device", "cpu"]


@pytest.fixture
def ee(early_exit):
    return ["--checkpoint_path", early_exit, "--threshold", "0.45", "--device", "cpu"]


def test_two_backbones(duo, tmp_path, run_quietly):
    said = run_quietly(sampler.main, [*duo, "--t_switch", 5, "--output_folder", tmp_path / "s", "--batch_size", 3])
    assert timesteps_told(said) == {"shallow": 14, "full": 6}
    images = samples(tmp_path / "s")
    assert list(images) == ["000000.png", "000001.png", "000002.png"]
    assert images["000000.png"].shape == (8, 8) and images["000000.png"].dtype == np.uint8
    about = statistics(tmp_path / "s")
    assert [b["timesteps"] for b in about["backbones"]] == [14, 6]
    assert [b["weights"] for b in about["backbones"]] == ["ema", "ema"]
    flops = [b["flops_per_image_call"] for b in about["backbones"]]
    assert about["network_flops_per_image"] == 14 * flops[0] + 6 * flops[1]
    assert about["settings"]["t_switch"] == 5 and about["images_per_second"] > 0
    assert (tmp_path / "s" / "report" / "grid_image.png").exists()


@pytest.mark.parametrize(
    "solver",
    [["--solver", "ddpm"], ["--solver", "ddim", "--steps", "5", "--eta", "0.5"], ["--solver", "unipc", "--steps", "6"]],
)
@pytest.mark.parametrize("script", ["duo", "ee"])
def test_sample_i_is_the_same_whatever_the_batch_size(script, solver, duo, ee, tmp_path, run_quietly):
    main, flags = (sampler.main, [*duo, "--t_switch", 9]) if script == "duo" else (eesampler.main, ee)
    for name, batch_size in (("ones", 1), ("threes", 3), ("all", 7)):
        argv = [*flags, *solver, "--n_samples", 7, "--batch_size", batch_size, "--output_folder", tmp_path / name]
        run_quietly(main, argv)
    ones = samples(tmp_path / "ones")
    assert len(ones) == 7 and len({image.tobytes() for image in ones.values()}) == 7
    for other in ("threes", "all"):
        for name, image in samples(tmp_path / other).items():
            # Sums over a batch of another size may round differently; a level of 8 bits is the most it shows.
            assert np.abs(image.astype(int) - ones[name]).max() <= 1


def test_a_switch_at_the_ends_is_one_backbone_alone(duo, full, shallow, tmp_path, run_quietly):
    for name, t_switch, alone in (("late", 19, full), ("early", -1, shallow)):
        run_quietly(sampler.main, [*duo, "--t_switch", t_switch, "--output_folder", tmp_path / name, "--n_samples", 2])
        argv = ["--checkpoint_path", alone, "--output_folder", tmp_path / f"{name}_alone", "--n_samples", 2]
        run_quietly(sampler.main, argv)
        both = samples(tmp_path / name), samples(tmp_path / f"{name}_alone")
        assert all(np.array_equal(both[0][key], both[1][key]) for key in both[0])


def test_seeds_and_weights_matter(full, tmp_path, run_quietly):
    for name, flags in (("a", []), ("b", ["--seed", 1]), ("c", ["--weights", "raw"]), ("d", [])):
        run_quietly(
            sampler.main,
            ["--checkpoint_path", full, "--output_folder", tmp_path / name, "--n_samples", 1, *flags],
        )
    images = {name: samples(tmp_path / name)["000000.png"] for name in "abcd"}
    assert np.array_equal(images["a"], images["d"])
    assert not np.array_equal(images["a"], images["b"]) and not np.array_equal(images["a"], images["c"])


def test_early_exit_reports_where_images_left(ee, early_exit, tmp_path, run_quietly):
    said = run_quietly(eesampler.main, [*ee, "--n_samples", 5, "--batch_size", 2, "--output_folder", tmp_path / "s"])
    exits = np.load(tmp_path / "s" / "report" / "exits.npz")
    assert exits["timesteps"].tolist() == list(range(19, -1, -1))
    assert exits["exit_layer"].shape == (20, 5) and exits["uncertainty"].shape == (20, 5)
    assert exits["exit_layer"].min() >= 0 and exits["exit_layer"].max() <= 5
    mean = exits["exit_layer"].mean()
    assert f"mean exit layer {mean:.2f} of 5" in said
    about = statistics(tmp_path / "s")
    assert about["backbones"][0]["mean_exit_layer"] == pytest.approx(mean)
    assert 0 < about["network_flops_per_image"] <= 20 * about["backbones"][0]["flops_per_image_call"]
    assert (tmp_path / "s" / "report" / "exit_layer.png").exists()


def test_a_threshold_of_0_is_the_backbone_itself(full, early_exit, tmp_path, run_quietly):
    run_quietly(sampler.main, ["--checkpoint_path", full, "--output_folder", tmp_path / "full", "--n_samples", 3])
    argv = ["--checkpoint_path", early_exit, "--threshold", 0, "--output_folder", tmp_path / "ee", "--n_samples", 3]
    run_quietly(eesampler.main, argv)
    a, b = samples(tmp_path / "full"), samples(tmp_path / "ee")
    assert all(np.array_equal(a[key], b[key]) for key in a)


def test_intermediate_frames(full, tmp_path, run_quietly):
    argv = ["--checkpoint_path", full, "--output_folder", tmp_path / "s", "--n_samples", 3, "--batch_size", 2]
    run_quietly(sampler.main, [*argv, "--timesteps_save", 19, 10, 0])
    frames = tmp_path / "s" / "report" / "frames"
    assert sorted(p.name for p in frames.iterdir()) == ["t0000", "t0010", "t0019"]
    assert list(samples(frames / "t0010")) == ["000000.png", "000001.png", "000002.png"]
    picture = np.array(Image.open(frames.parent / "frames.png"))
    under = picture[3 * 66 :]
    assert picture.shape[1] == 4 * 66 and 12 < len(under) < 40
    dark = [(under[:, 66 * k : 66 * (k + 1)] < 128).sum() for k in range(4)]
    assert dark[2] < dark[1] and dark[2] < dark[0] and min(dark) > 10, "t = 0 has a letter less than t = 10 and t = 19"


def test_bare_weights_need_a_config(full, tmp_path, run_quietly, fails):
    content = torch.load(full, weights_only=True)
    network = UViT(**content["config"]["model_params"])
    load_weights(network, full)
    torch.save(network.state_dict(), tmp_path / "bare.pth")
    diffusion = content["config"]["diffusion_params"]
    (tmp_path / "net.yaml").write_text(
        yaml.safe_dump({"model_params": TINY | {"depth": 5}, "diffusion_params": diffusion})
    )
    argv = ["--checkpoint_path", tmp_path / "bare.pth", "--n_samples", 2]
    fails(sampler.main, [*argv, "--output_folder", tmp_path / "x"], "bare.pth", "--config_path")
    run_quietly(sampler.main, [*argv, "--config_path", tmp_path / "net.yaml", "--output_folder", tmp_path / "bare"])
    run_quietly(sampler.main, ["--checkpoint_path", full, "--n_samples", 2, "--output_folder", tmp_path / "own"])
    a, b = samples(tmp_path / "bare"), samples(tmp_path / "own")
    assert all(np.array_equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    "t_switch, steps, idle",
    [
        (19, 4, "shallow"),
        (-1, 4, "full"),
        (3, 4, "full"),  # the steps are t = 19, 14, 9, 4
        (4, 4, None),
        (18, 4, None),
        (0, 20, None),
    ],
)
def test_an_idle_network_is_named(t_switch, steps, idle, duo, full, shallow, tmp_path, run_quietly, caplog):
    flags = ["--t_switch", t_switch, "--solver", "ddim", "--steps", steps, "--n_samples", 1]
    run_quietly(sampler.main, [*duo, *flags, "--output_folder", tmp_path / "s"])
    ran = {backbone["name"]: backbone["timesteps"] for backbone in statistics(tmp_path / "s")["backbones"]}
    assert [name for name, timesteps in ran.items() if timesteps == 0] == [idle] * bool(idle)
    stage = f"stage 2 (full, {full})" if idle == "full" else f"stage 1 (shallow, {shallow})"
    assert [record.getMessage() for record in caplog.records] == [
        f"--t_switch {t_switch}: {stage} does not run: it contains none of the {steps} timesteps, t = 19..4"
    ] * bool(idle)


def test_swapped_networks_are_named(duo, full, shallow, tmp_path, run_quietly, caplog):
    """DuoDiff in its order, and one network twice, say nothing."""
    flags = ["--t_switch", 9, "--n_samples", 1, "--device", "cpu", "--output_folder"]
    run_quietly(sampler.main, [*duo, *flags, tmp_path / "s"])
    run_quietly(sampler.main, ["--checkpoint_path", full, "--checkpoint_path_late", full, *flags, tmp_path / "twice"])
    assert not caplog.records
    run_quietly(sampler.main, ["--checkpoint_path", full, "--checkpoint_path_late", shallow, *flags, tmp_path / "swap"])
    less, more = (b["flops_per_image_call"] / 1e9 for b in statistics(tmp_path / "s")["backbones"])
    assert [record.getMessage() for record in caplog.records] == [
        f"the network of the first stage costs more than that of the last ({more:.3g} against {less:.3g} GFLOP per "
        "call): were --checkpoint_path and --checkpoint_path_late swapped?"
    ]
    assert len(samples(tmp_path / "swap")) == 1


class TestFlagsThatDescribe:
    """Weights that came without a description: any option of a network may be a flag."""

    @pytest.fixture
    def bare(self, tmp_path):
        def strip(path):
            content = torch.load(path, weights_only=True)
            torch.save(content["model"] | content["ema"], tmp_path / f"bare_{path.parent.name}.pth")
            return tmp_path / f"bare_{path.parent.name}.pth"

        return strip

    @pytest.fixture
    def same(self, tmp_path, run_quietly):
        """Two command lines make the same images."""

        def check(main, *lines):
            for number, argv in enumerate(lines):
                flags = ["--n_samples", 2, "--output_folder", tmp_path / f"{number}", "--device", "cpu"]
                run_quietly(main, [*argv, *flags])
            one, other = (samples(tmp_path / f"{number}") for number in range(2))
            assert all(np.array_equal(one[name], other[name]) for name in ("000000.png", "000001.png"))

        return check

    def test_one_network(self, bare, full, same):
        described = ["--checkpoint_path", bare(full), *DESCRIPTION, "--depth", 5]
        same(sampler.main, described, ["--checkpoint_path", full])

    def test_a_flag_beats_the_yaml(self, bare, full, tmp_path, same):
        about = {"model_params": TINY | {"depth": 9}, "diffusion_params": {"num_timesteps": 30}}
        (tmp_path / "net.yaml").write_text(yaml.safe_dump(about))
        described = ["--checkpoint_path", bare(full), "--config_path", tmp_path / "net.yaml"]
        same(sampler.main, [*described, "--depth", 5, "--num_timesteps", 20], ["--checkpoint_path", full])

    def test_early_exit(self, bare, early_exit, same):
        flags = [*DESCRIPTION, "--depth", 5, "--classifier_type", "mlp_probe_per_layer", "--threshold", 0.45]
        carried = ["--checkpoint_path", early_exit, "--threshold", 0.45]
        same(eesampler.main, ["--checkpoint_path", bare(early_exit), *flags], carried)

    def test_of_two_networks_the_first_is_meant(self, bare, full, shallow, tmp_path, same, fails):
        (tmp_path / "full.yaml").write_text(yaml.safe_dump({"model_params": TINY | {"depth": 5}}))
        two = ["--checkpoint_path", bare(shallow), "--checkpoint_path_late", bare(full), "--t_switch", 9]
        fails(sampler.main, [*two, *DESCRIPTION, "--depth", 1, "--output_folder", tmp_path / "x"], "bare_full.pth")
        described = [*two, *DESCRIPTION, "--depth", 1, "--config_path_late", tmp_path / "full.yaml"]
        same(sampler.main, described, ["--checkpoint_path", shallow, "--checkpoint_path_late", full, *two[4:]])

    def test_of_a_file_of_stages_too(self, bare, full, shallow, tmp_path, same):
        stages = [(bare(shallow), 10, 19), (full, 0, 9)]
        stages = [{"checkpoint_path": str(path), "t_min": low, "t_max": high} for path, low, high in stages]
        (tmp_path / "s.yaml").write_text(yaml.safe_dump({"stages": stages}))
        described = ["--stages", tmp_path / "s.yaml", *DESCRIPTION, "--depth", 1]
        two = ["--checkpoint_path", shallow, "--checkpoint_path_late", full, "--t_switch", 9]
        same(sampler.main, described, two)

    def test_what_weights_say_themselves_is_not_contradicted(self, full, early_exit, tmp_path, fails):
        argv = ["--output_folder", tmp_path / "s", "--checkpoint_path"]
        fails(sampler.main, [*argv, full, "--depth", 7], "last.pth differs", "model_params.depth (5 and 7)")
        fails(sampler.main, [*argv, full, "--num_timesteps", 30], "num_timesteps (20 and 30)")
        other = ["--threshold", 0.5, "--classifier_type", "attention_probe"]
        fails(eesampler.main, [*argv, early_exit, *other], "classifier_type (mlp_probe_per_layer and attention_probe)")
        assert not (tmp_path / "s").exists()

    def test_weights_that_nothing_describes(self, bare, full, tmp_path, fails):
        argv = ["--output_folder", tmp_path / "s", "--checkpoint_path", bare(full), "--depth", 5]
        fails(sampler.main, argv, "bare_full.pth", "--config_path", "--img_size")


def test_classes(runs, tmp_path, run_quietly, fails, full):
    network = runs / "classes" / "digits_uvit_last.pth"
    argv = ["--checkpoint_path", network, "--n_samples", 3]
    run_quietly(sampler.main, [*argv, "--output_folder", tmp_path / "random"])
    run_quietly(sampler.main, [*argv, "--output_folder", tmp_path / "seven", "--class_id", 7])
    assert len(samples(tmp_path / "seven")) == 3
    fails(sampler.main, [*argv, "--output_folder", tmp_path / "x", "--class_id", 10], "--class_id 10", "0..9")
    fails(sampler.main, [*argv, "--output_folder", tmp_path / "x", "--class_id", "cat"], "cat", "or random")
    fails(sampler.main, [*argv, "--output_folder", tmp_path / "x", "--class_id", 3, "random"], "random alone")
    seven = ["--n_samples", 3, "--output_folder", tmp_path / "seven", "--checkpoint_path", network, "--class_id"]
    fails(sampler.main, [*seven, 7, 8], "class_id (7 and 7, 8)")
    argv = ["--checkpoint_path", full, "--output_folder", tmp_path / "x", "--class_id", 1]
    fails(sampler.main, argv, "unconditional")


def test_guidance(runs, duo, early_exit, tmp_path, run_quietly, fails):
    network = runs / "no_class" / "digits_uvit_last.pth"
    argv = ["--checkpoint_path", network, "--n_samples", 4, "--class_id", 3, 5]
    for scale in (0, 2):
        run_quietly(sampler.main, [*argv, "--guidance_scale", scale, "--output_folder", tmp_path / f"s{scale}"])
    plain, guided = samples(tmp_path / "s0"), samples(tmp_path / "s2")
    assert not np.array_equal(plain["000000.png"], guided["000000.png"])
    flops = [statistics(tmp_path / f"s{scale}")["network_flops_per_image"] for scale in (0, 2)]
    assert flops[1] == 2 * flops[0]
    fails(sampler.main, [*argv, "--output_folder", tmp_path / "x", "--class_id", 10], "--class_id 10", "0..9")
    both = ["--checkpoint_path_late", network, "--t_switch", 9, "--guidance_scale_late", 1]
    run_quietly(sampler.main, [*argv, *both, "--output_folder", tmp_path / "both"])
    flops = [b["flops_per_image_call"] for b in statistics(tmp_path / "both")["backbones"]]
    assert flops[1] == 2 * flops[0]
    unguidable = ["--output_folder", tmp_path / "x", "--guidance_scale", 1]
    fails(sampler.main, [*duo, "--t_switch", 3, *unguidable], "--guidance_scale 1", "no class")
    assert not (tmp_path / "x").exists(), "what is refused leaves nothing"
    fails(sampler.main, ["--checkpoint_path", runs / "classes" / "digits_uvit_last.pth", *unguidable], "no class")


def test_guidance_with_early_exit(runs, tmp_path, run_quietly):
    argv = ["--checkpoint_path", runs / "ee_no_class" / "digits_deediff_uvit_last.pth", "--threshold", 0.45]
    argv += ["--n_samples", 5, "--batch_size", 2, "--guidance_scale", 1, "--output_folder", tmp_path / "s"]
    run_quietly(eesampler.main, argv)
    exits = np.load(tmp_path / "s" / "report" / "exits.npz")
    assert exits["exit_layer"].shape == exits["exit_layer_uncond"].shape == (20, 5)


class TestBadInput:
    def test_samples_are_not_overwritten(self, full, tmp_path, run_quietly, fails):
        argv = ["--checkpoint_path", full, "--output_folder", tmp_path / "s"]
        run_quietly(sampler.main, [*argv, "--n_samples", 3])
        before = samples(tmp_path / "s")
        fails(sampler.main, [*argv, "--n_samples", 2, "--seed", 5], "3 samples", "--overwrite")
        assert samples(tmp_path / "s").keys() == before.keys()
        run_quietly(sampler.main, [*argv, "--n_samples", 2, "--seed", 5, "--overwrite"])
        after = samples(tmp_path / "s")
        assert list(after) == ["000000.png", "000001.png"]
        assert not np.array_equal(after["000000.png"], before["000000.png"])

    def test_a_folder_with_something_else_is_left_alone(self, full, tmp_path, fails):
        (tmp_path / "s").mkdir()
        (tmp_path / "s" / "cat.png").write_bytes(b"a cat")
        argv = ["--checkpoint_path", full, "--output_folder", tmp_path / "s", "--overwrite"]
        fails(sampler.main, argv, "cat.png")
        assert (tmp_path / "s" / "cat.png").read_bytes() == b"a cat"

    def test_a_report_of_something_else_is_left_alone(self, full, tmp_path, fails):
        (tmp_path / "paper" / "report").mkdir(parents=True)
        (tmp_path / "paper" / "report" / "thesis.tex").write_text("x")
        for flags in ([], ["--overwrite"]):
            fails(
                sampler.main, ["--checkpoint_path", full, "--output_folder", tmp_path / "paper", *flags], "thesis.tex"
            )
        assert (tmp_path / "paper" / "report" / "thesis.tex").exists()

    def test_a_run_that_was_stopped_is_not_scored_as_whole(self, full, tmp_path, fails, monkeypatch):
        saved, save = [], generation.folder.save_png

        def stop_after_four(path, image):
            if len(saved) == 4:
                raise KeyboardInterrupt
            saved.append(path)
            return save(path, image)

        monkeypatch.setattr(generation.folder, "save_png", stop_after_four)
        argv = ["--checkpoint_path", full, "--output_folder", tmp_path / "s", "--n_samples", 9, "--batch_size", 2]
        with pytest.raises(SystemExit) as ended:
            sampler.main([str(arg) for arg in [*argv]])
        assert ended.value.code == 130 and len(samples(tmp_path / "s")) == 4
        fails(fid.main, ["--samples_path", tmp_path / "s", "--dataset", "digits"], "4 images", "counts 9")

    def test_settings_of_another_type_in_a_checkpoint(self, full, tmp_path, fails):
        content = torch.load(full, weights_only=True)
        for config in ({"model_params": 3}, {"model_params": {"img_size": "8"}}, {"nonsense": 1}):
            torch.save(content | {"config": config}, tmp_path / "odd.pth")
            fails(
                sampler.main, ["--checkpoint_path", tmp_path / "odd.pth", "--output_folder", tmp_path / "s"], "odd.pth"
            )

    @pytest.mark.parametrize(
        "error",
        [
            torch.OutOfMemoryError("CUDA out of memory"),
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9000000000 bytes"),
            MemoryError(),
        ],
    )
    def test_out_of_memory(self, error, full, tmp_path, fails, monkeypatch):
        def too_large(*_):
            raise error

        monkeypatch.setattr(UViT, "forward", too_large)
        fails(sampler.main, ["--checkpoint_path", full, "--output_folder", tmp_path / "s"], "out of memory")

    def test_a_failure_to_load_keeps_the_samples(self, full, tmp_path, run_quietly, fails):
        argv = ["--output_folder", tmp_path / "s", "--n_samples", 1]
        run_quietly(sampler.main, ["--checkpoint_path", full, *argv])
        (tmp_path / "cut.pth").write_bytes(full.read_bytes()[:5000])
        fails(sampler.main, ["--checkpoint_path", tmp_path / "cut.pth", *argv, "--overwrite"], "cut.pth", "cut short")
        assert len(samples(tmp_path / "s")) == 1 and (tmp_path / "s" / "report" / "statistics.json").exists()

    def test_the_pair_must_fit(self, runs, full, tmp_path, fails):
        argv = ["--checkpoint_path", runs / "classes" / "digits_uvit_last.pth", "--checkpoint_path_late", full]
        fails(sampler.main, [*argv, "--t_switch", 3, "--output_folder", tmp_path / "s"], "num_classes (10 and -1)")

    @pytest.mark.parametrize("t_switch, words", [(20, ["--t_switch 20", "-1..19"]), (-2, ["--t_switch"])])
    def test_a_switch_out_of_range(self, t_switch, words, duo, tmp_path, fails):
        fails(sampler.main, [*duo, "--t_switch", t_switch, "--output_folder", tmp_path / "s"], *words)

    def test_options(self, duo, ee, full, early_exit, tmp_path, fails):
        one = ["--checkpoint_path", full, "--output_folder", tmp_path / "s"]
        fails(sampler.main, [*duo, "--output_folder", tmp_path / "s"], "--t_switch")
        fails(sampler.main, [*one, "--t_switch", 3], "--checkpoint_path_late")
        fails(sampler.main, [*one, "--eta", 0.5], "--eta")
        fails(sampler.main, [*one, "--steps", 21], "--steps 21", "1..20")
        fails(sampler.main, [*one, "--steps", 4, "--timesteps_save", 18], "--timesteps_save 18")
        fails(sampler.main, [*one, "--parametrization", "predict_original"], "parametrization")
        fails(sampler.main, ["--checkpoint_path", tmp_path / "none.pth", "--output_folder", tmp_path], "none.pth")
        fails(sampler.main, ["--checkpoint_path", early_exit, "--output_folder", tmp_path / "s"], "eesampler.py")
        wrong = ["--checkpoint_path", full, "--output_folder", tmp_path / "s", "--threshold"]
        fails(eesampler.main, [*wrong, 0.1], "sampler.py")
        fails(eesampler.main, [*wrong, 1.5], "--threshold")
        fails(eesampler.main, [*wrong, "nan"], "--threshold")
        fails(sampler.main, ["--checkpoint_path", full, "--output_folder", full], full.name)

    @pytest.mark.parametrize(
        "text, word",
        [
            ("model_params: {img_size: 8, patch_size: 4, dept: 3}", "dept"),
            ("model_params: {img_size: eight, patch_size: 4}", "img_size"),
            ("model_params: {img_size: 8, patch_size: 4, qkv_bias: 1}", "qkv_bias"),
            ("model_params: {img_size: 8, patch_size: 4, in_chans: 1, embed_dim: 32, num_heads: 4, depth: 7}", "depth"),
            ("modelparams: {}", "model_params"),
            ("model_params: [", "YAML"),
            ("model_params: !!python/object/apply:os.system [ls]", "YAML"),
            ("\x00", "YAML"),
            ("", "model_params"),
        ],
    )
    def test_a_config_that_does_not_fit(self, text, word, full, tmp_path, fails):
        (tmp_path / "bad.yaml").write_text(text)
        argv = ["--checkpoint_path", full, "--output_folder", tmp_path / "s", "--config_path", tmp_path / "bad.yaml"]
        fails(sampler.main, argv, "bad.yaml" if "depth: 7" not in text else "last.pth", word)
