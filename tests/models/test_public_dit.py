"""DiT and SiT under their public names: their networks, their time inputs, and two of them in one run, untrained."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKL
from PIL import Image

import calibrate as calibrate_script
import sampler as sampler_script
from common.config import build_config, read_yaml
from common.options import SolverSettings
from diffusion import NoiseSchedule, time_input
from diffusion.matching import own_timesteps
from diffusion.sampling import SeededNoise, Stage, sample
from generation.run import readable, solver_of
from models.inference import BackboneDenoiser
from models.loading import build_network
from tests.conftest import perturbed

CONFIGS = Path(__file__).parents[2] / "configs"
SIZES = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "xl": (1152, 28, 16)}  # width, blocks, heads
NAMES = list(itertools.product(("dit", "sit"), SIZES))
SMALL = {"input_size": 4, "hidden_size": 32, "num_heads": 4, "depth": 2}
TABLE = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))  # of DiT


def public(family: str, size: str = "xl", **small):
    path = CONFIGS / f"{family}_imagenet256_{size}_public.yaml"
    settings = read_yaml(path)
    settings["model_params"] |= small
    return build_config(settings, str(path))


def of_process(family: str, alpha_bar: float) -> float:
    """What the network is told, by its authors' process alone: DiT the place in its table, SiT its time."""
    if family == "dit":
        return float(np.interp(-math.log(alpha_bar), -np.log(TABLE), np.arange(1000)))
    return alpha_bar**0.5 / (alpha_bar**0.5 + (1 - alpha_bar) ** 0.5)  # alpha bar = t^2 / (t^2 + (1 - t)^2)


def told(network, timesteps: torch.Tensor, monkeypatch) -> torch.Tensor:
    """What goes into the embedding of a network at these timesteps, (B,)."""
    seen = []
    monkeypatch.setattr("models.dit.timestep_embedding", lambda t, dim: seen.append(t) or torch.zeros(len(t), dim))
    network.time_tokens(timesteps)
    return seen[0].double()


@pytest.mark.parametrize(("family", "size"), NAMES)
def test_networks(family, size):
    config, (width, blocks, heads) = public(family, size), SIZES[size]
    params = config.model_params
    assert (params.hidden_size, params.depth, params.num_heads) == (width, blocks, heads)
    assert (params.patch_size, params.image_shape, params.mlp_ratio) == (2, (4, 32, 32), 4)
    assert (config.classes, config.no_class, params.num_labels) == (range(1000), 1000, 1001)
    assert config.autoencoder.scale_factor == 0.18215
    assert config.parametrization == {"dit": "predict_noise", "sit": "predict_velocity"}[family]


@pytest.mark.parametrize(("family", "size"), NAMES)
def test_a_network_is_told_the_time_of_its_own_process(family, size, monkeypatch):
    config = public(family, size, **SMALL)
    alpha_bars = NoiseSchedule(**config.diffusion_params.schedule).alphas_cumprod
    want = torch.tensor([of_process(family, float(alpha_bar)) for alpha_bar in alpha_bars], dtype=torch.float64)
    got = told(build_network(config), torch.arange(1000), monkeypatch)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4 if family == "dit" else 1e-6)
    between = [time_input(config.diffusion_params, alpha_bar) for alpha_bar in np.geomspace(0.005, 0.999, 57)]
    want = [of_process(family, alpha_bar) for alpha_bar in np.geomspace(0.005, 0.999, 57)]
    assert between == pytest.approx(want, rel=1e-6, abs=1e-5)


def sampled(config, network, steps: int, scale: float, y: torch.Tensor) -> torch.Tensor:
    """As sampler.py does it, by DDIM."""
    solver, timesteps = solver_of(SolverSettings(solver="ddim", steps=steps), [config])
    times = own_timesteps(config.diffusion_params, solver.schedule, timesteps)
    denoiser = BackboneDenoiser(network, times, torch.float32, torch.device("cpu"))
    stages = [Stage(readable(denoiser, config, solver, scale), timesteps)]
    return sample(stages, solver, SeededNoise([1, 2]), (4, 4, 4), y)


@pytest.mark.parametrize("family", ["dit", "sit"])
def test_the_trajectory_of_its_own_sampler(family):
    """DiT's DDIM and SiT's Euler steps, with their own guidance (of all channels), without the project's code.

    DDIM is Euler's method in the coordinates of rectified flow.
    """
    torch.manual_seed(0)
    config, y = public(family, **SMALL), torch.tensor([3, 999])
    network = perturbed(build_network(config)).eval()
    plain = build_network(config).eval()
    plain.load_state_dict(network.state_dict())
    plain.time_scale, plain.time_shift = 1.0, 0.0

    def guided(x, t):
        cond, uncond = (plain(x, t, classes) for classes in (y, torch.full_like(y, 1000)))
        return uncond + 1.5 * (cond - uncond)

    x, steps = SeededNoise([1, 2])(4, 4, 4), 20
    with torch.no_grad():
        if family == "dit":
            visited = [1000 * k // steps - 1 for k in range(steps, 0, -1)]
            for k, alpha_bar, after in zip(visited, TABLE[visited], [*TABLE[visited[1:]], 1.0], strict=True):
                eps = guided(x, k)
                x0 = (x - (1 - alpha_bar) ** 0.5 * eps) / alpha_bar**0.5
                x = after**0.5 * x0 + (1 - after) ** 0.5 * eps
        else:
            times = [1 - (1000 * k / steps - 0.5) / 1000 for k in range(steps, 0, -1)]
            x = x * (times[0] ** 2 + (1 - times[0]) ** 2) ** 0.5  # of variance 1 there
            for t, after in zip(times, [*times[1:], 1.0], strict=True):
                x = x + (after - t) * guided(x, t)
    got = sampled(config, network, steps, 0.5, y)
    torch.testing.assert_close(got, x, rtol=1e-3, atol=1e-3 * x.abs().max().item())


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Files under the public names with random weights of narrow networks, their descriptions, and an autoencoder."""
    folder = tmp_path_factory.mktemp("public")
    torch.manual_seed(0)
    narrow = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1, "latent_channels": 4}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    AutoencoderKL(**narrow, **blocks).save_pretrained(folder / "vae")
    for name in ("dit_imagenet256_l", "dit_imagenet256_xl", "sit_imagenet256_s", "sit_imagenet256_xl"):
        settings = read_yaml(CONFIGS / f"{name}_public.yaml")
        settings["model_params"] |= SMALL | {"depth": 3 if name.endswith("xl") else 1}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings))
        learned = settings["model_params"] | {"learn_sigma": True}
        network = build_network(build_config(settings | {"model_params": learned}, name))
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.normal_(std=0.05)
        torch.save(network.state_dict(), folder / f"{name}.pt")
    for name in ("uvit_imagenet256_large", "uvit_imagenet256_huge", "uvit_imagenet64_mid", "uvit_imagenet64_large"):
        settings = read_yaml(CONFIGS / f"{name}_public.yaml")
        depth = {"uvit_imagenet256_large": 3, "uvit_imagenet64_mid": 1}.get(name, 5)
        settings["model_params"] |= {"img_size": 4, "patch_size": 2, "embed_dim": 32, "num_heads": 4, "depth": depth}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings))
        torch.save(build_network(build_config(settings, name)).state_dict(), folder / f"{name}.pt")
    return folder


def argv_of(files, early, late, out, *flags):
    argv = [
        *("--checkpoint_path", files / f"{early}.pt", "--config_path", files / f"{early}.yaml"),
        *("--checkpoint_path_late", files / f"{late}.pt", "--config_path_late", files / f"{late}.yaml"),
        *("--n_samples", 2, "--output_folder", out, "--solver", "ddim", "--steps", 6, "--device", "cpu", "--quiet"),
    ]
    if "256" in early + late:
        argv += ["--autoencoder_checkpoint_path", files / "vae"]
    return [str(word) for word in [*argv, *flags]]


@pytest.mark.parametrize(
    ("early", "late", "guidance"),
    [
        ("dit_imagenet256_l", "dit_imagenet256_xl", 3),
        ("sit_imagenet256_s", "sit_imagenet256_xl", 0.5),
        ("sit_imagenet256_s", "dit_imagenet256_xl", 0.5),
        ("uvit_imagenet256_large", "uvit_imagenet256_huge", 0.4),
        ("uvit_imagenet64_mid", "uvit_imagenet64_large", 0),
        ("dit_imagenet256_l", "uvit_imagenet256_huge", 0.4),
    ],
)
def test_two_public_files_share_the_sampling_without_training(early, late, guidance, files, tmp_path, run_quietly):
    argv = argv_of(files, early, late, tmp_path / "out", "--logsnr_switch", -1, "--guidance_scale", guidance)
    said = run_quietly(sampler_script.main, argv)
    assert "log-SNR -" in said and len(list((tmp_path / "out").glob("*.png"))) == 2
    about = json.loads((tmp_path / "out" / "report" / "statistics.json").read_text())
    assert all(backbone["timesteps"] > 0 for backbone in about["backbones"])
    first, second = (backbone["flops_per_image_call"] for backbone in about["backbones"])
    assert first < second


@pytest.mark.parametrize(
    ("early", "late", "flags", "words"),
    [
        (
            "uvit_imagenet64_mid",
            "dit_imagenet256_xl",
            ["--t_switch", 500],
            ["image shape (3, 4, 4 and 4, 4, 4)", "num_classes"],
        ),
        ("sit_imagenet256_s", "sit_imagenet256_xl", ["--parametrization", "predict_noise"], ["a flow network"]),
    ],
)
def test_what_does_not_fit_is_named(early, late, flags, words, files, tmp_path, fails):
    flags = flags if "--t_switch" in flags else [*flags, "--t_switch", 500]
    fails(sampler_script.main, argv_of(files, early, late, tmp_path / "out", *flags), *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("early", "late", "flags", "words"),
    [
        ("uvit_imagenet64_mid", "dit_imagenet256_xl", [], ["image shape (3, 4, 4 and 4, 4, 4)"]),
        ("sit_imagenet256_s", "sit_imagenet256_xl", ["--parametrization", "predict_noise"], ["a flow network"]),
        ("dit_imagenet256_xl", "dit_imagenet256_l", [], ["is larger than", "from small to large"]),
        (
            "uvit_imagenet64_mid",
            "uvit_imagenet64_large",
            ["--guidance_scale", 1],
            ['no "no class"'],
        ),
    ],
)
def test_what_cannot_be_calibrated_is_named(early, late, flags, words, files, tmp_path, fails):
    (tmp_path / "imagenet" / "n01440764").mkdir(parents=True)
    Image.new("RGB", (70, 70)).save(tmp_path / "imagenet" / "n01440764" / "a.png")
    Image.new("RGB", (70, 70)).save(tmp_path / "imagenet" / "n01440764" / "b.png")
    dataset = "imagenet256" if "256" in early + late else "imagenet64"
    argv = ["--checkpoint_path", *(files / f"{name}.pt" for name in (early, late))]
    argv += ["--config_path", *(files / f"{name}.yaml" for name in (early, late)), "--device", "cpu", "--quiet"]
    argv += ["--dataset", dataset, "--data_path", tmp_path, "--n_images", 2, "--output", tmp_path / "c.yaml", *flags]
    if dataset == "imagenet256":
        argv += ["--autoencoder_checkpoint_path", files / "vae"]
    fails(calibrate_script.main, argv, *words)
    assert not list(tmp_path.glob("c.*"))


def test_a_class_that_no_public_network_has(files, tmp_path, fails):
    pair = ["dit_imagenet256_l", "dit_imagenet256_xl", tmp_path / "out", "--t_switch", 500]
    fails(
        sampler_script.main, argv_of(files, *pair, "--class_name", "golden retreiver"), "did you mean golden retriever"
    )
    fails(sampler_script.main, argv_of(files, *pair, "--class_id", 1000), "the network has the classes 0..999")
    assert not (tmp_path / "out").exists()


def test_latents_of_two_scales(files, tmp_path, fails):
    settings = read_yaml(files / "sit_imagenet256_s.yaml")
    settings["autoencoder"]["scale_factor"] = 0.13025
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(settings))
    argv = argv_of(files, "sit_imagenet256_s", "dit_imagenet256_xl", tmp_path / "out", "--t_switch", 500)
    argv[argv.index(str(files / "sit_imagenet256_s.yaml"))] = str(tmp_path / "other.yaml")
    fails(sampler_script.main, argv, "scale of latents (0.13025 and 0.18215)")
