"""The public U-ViT weights: their networks, their time inputs, their schedules, their classes."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from common.config import build_config, read_yaml
from diffusion import NoiseSchedule, time_input
from diffusion.sampling import SeededNoise, Stage, guided, sample
from diffusion.solvers import Solver, make_solver, spaced_timesteps
from models.loading import build_network

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = {"img_size": 4, "patch_size": 2, "embed_dim": 32, "num_heads": 4, "depth": 1}

# img_size, patch_size, in_chans, embed_dim, blocks, num_heads, num_classes, conv
NETWORKS = {
    "cifar10": (32, 2, 3, 512, 13, 8, -1, True),
    "celeba": (64, 4, 3, 512, 13, 8, -1, True),
    "imagenet64_mid": (64, 4, 3, 768, 17, 12, 1000, True),
    "imagenet64_large": (64, 4, 3, 1024, 21, 16, 1000, True),
    "imagenet256_large": (32, 2, 4, 1024, 21, 16, 1001, True),
    "imagenet512_large": (64, 4, 4, 1024, 21, 16, 1001, True),
    "imagenet256_huge": (32, 2, 4, 1152, 29, 16, 1001, False),
    "imagenet512_huge": (64, 4, 4, 1152, 29, 16, 1001, False),
}


# The processes the networks were trained on, without the project's code: what a network is told where x_t has an alpha
# bar, and back.


def continuous_alpha_bar(told: np.ndarray) -> np.ndarray:
    """VP SDE with beta from 0.1 to 20, told 999 times its time."""
    time = told / 999
    return np.exp(-(0.1 * time + (20 - 0.1) * time**2 / 2))


def continuous_told(alpha_bar: float) -> float:
    low, high = 0.0, 2000.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if continuous_alpha_bar(middle) > alpha_bar else (low, middle)
    return low


# Stable Diffusion's table; n = 1..1000, between them linear in log alpha.
HUGE_TABLE = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)


def discrete_alpha_bar(told: np.ndarray) -> np.ndarray:
    return np.exp(np.interp(told, np.arange(1, 1001), np.log(HUGE_TABLE)))


def discrete_told(alpha_bar: float) -> float:
    return float(np.interp(-math.log(alpha_bar), -np.log(HUGE_TABLE), np.arange(1, 1001)))


def process(name: str):
    """The two functions above, of a network."""
    return (discrete_alpha_bar, discrete_told) if "huge" in name else (continuous_alpha_bar, continuous_told)


def public(name: str, **small):
    path = CONFIGS / f"uvit_{name}_public.yaml"
    settings = read_yaml(path)
    settings["model_params"] |= small
    return build_config(settings, str(path))


def told(network, timesteps: torch.Tensor, monkeypatch) -> torch.Tensor:
    """What goes into the embedding of a network at these timesteps, (B,)."""
    seen = []
    embedding = "models.uvit.timestep_embedding"
    monkeypatch.setattr(embedding, lambda t, dim: seen.append(t) or torch.zeros(len(t), dim))
    network.time_tokens(timesteps)
    return seen[0].double()


def test_there_is_a_config_for_each_network():
    assert {path.stem for path in CONFIGS.glob("uvit_*_public.yaml")} == {f"uvit_{name}_public" for name in NETWORKS}
    assert {path.stem for path in CONFIGS.glob("deediff_*_public.yaml")} == {
        f"deediff_{name}_public" for name in NETWORKS
    }


@pytest.mark.parametrize("name", NETWORKS)
def test_early_exit_is_described_like_its_backbone(name):
    backbone, early_exit = (read_yaml(CONFIGS / f"{kind}_{name}_public.yaml") for kind in ("uvit", "deediff"))
    assert early_exit == backbone | {"classifier_type": "mlp_probe_per_layer"}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name):
    config = public(name)
    params = config.model_params
    got = (params.img_size, params.patch_size, params.in_chans, params.embed_dim, params.num_blocks, params.num_heads)
    assert (*got, params.num_classes, params.conv) == NETWORKS[name]
    assert (params.mlp_ratio, params.qkv_bias, params.mlp_time_embed) == (4, False, False)
    assert not params.normalize_timesteps
    latents = name.startswith(("imagenet256", "imagenet512"))
    assert (config.autoencoder is not None) == latents
    if latents:
        assert config.autoencoder.scale_factor == 0.18215
        assert config.classes == range(1000) and config.no_class == 1000
    else:
        assert config.no_class is None


def test_crops():
    assert public("celeba").crop == "uvit128"


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_told_the_time_of_its_own_process(name, monkeypatch):
    """At every timestep: that of the alpha bar which the sampler's images have there."""
    config = public(name, **SMALL)
    _, of_process = process(name)
    alpha_bars = NoiseSchedule(**config.diffusion_params.schedule).alphas_cumprod
    want = torch.tensor([of_process(float(alpha_bar)) for alpha_bar in alpha_bars], dtype=torch.float64)
    got = told(build_network(config), torch.arange(1000), monkeypatch)
    torch.testing.assert_close(got, want, rtol=0, atol=2e-4)
    end = 1000 if "huge" in name else 999
    assert got[-1] == pytest.approx(end) and got[0] == pytest.approx(end / 1000)


@pytest.mark.parametrize("name", NETWORKS)
def test_time_inputs_between_timesteps(name):
    params, (_, of_process) = public(name).diffusion_params, process(name)
    for alpha_bar in np.geomspace(0.005, 0.999, 57):
        assert time_input(params, alpha_bar) == pytest.approx(of_process(alpha_bar), rel=1e-6, abs=1e-5)


@pytest.mark.parametrize(
    "path", sorted([*CONFIGS.glob("uvit_*.yaml"), *CONFIGS.glob("deediff_*.yaml")]), ids=lambda path: path.stem
)
def test_at_timesteps_the_network_and_time_input_agree(path, monkeypatch):
    settings = read_yaml(path)
    settings |= {"model": "uvit", "classifier_type": None}
    settings["model_params"] |= SMALL
    config = build_config(settings, str(path))
    alpha_bars = NoiseSchedule(**config.diffusion_params.schedule).alphas_cumprod.tolist()
    timesteps = range(0, 1000, 37)
    want = [time_input(config.diffusion_params, alpha_bars[t]) for t in timesteps]
    if config.model_params.normalize_timesteps:
        want = [value / 1000 for value in want]
    got = told(build_network(config), torch.tensor(timesteps), monkeypatch)
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("solver, steps", [("ddpm", 1000), ("ddim", 1000), ("dpmsolver++", 100)])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_perfect_network_samples_its_data(name, solver, steps, monkeypatch):
    """On data N(0.5, 1) the exact noise is known: that of the alpha bar which the network takes what it is told for."""
    config = public(name, **SMALL)
    network, (of_told, _) = build_network(config), process(name)
    alpha_bars = of_told(told(network, torch.arange(1000), monkeypatch).numpy())

    def perfect(x_t, t, y):
        # x_t is N(0.5 sqrt(alpha bar), 1), and the best guess of its noise is linear in it.
        return (1 - alpha_bars[t]) ** 0.5 * (x_t - alpha_bars[t] ** 0.5 * 0.5)

    draw = SeededNoise([1])
    start = draw(1, 256, 256) + 0.5 * alpha_bars[-1] ** 0.5  # the huge networks' process leaves a little of the image

    def noise(*shape):
        nonlocal start
        first, start = start, None
        return draw(*shape) if first is None else first

    schedule = NoiseSchedule(**config.diffusion_params.schedule)
    solver = make_solver(solver, schedule, "predict_noise")
    made = sample([Stage(perfect, spaced_timesteps(1000, steps))], solver, noise, (1, 256, 256))
    assert float(made.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(made.std()) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("name", ["imagenet256_large", "imagenet256_huge"])
def test_imagenet_256_takes_the_published_trajectory(name):
    """DDIM with guidance 0.4 on the published process, written without the project's code."""
    config = public(name, **SMALL | {"depth": 3})
    torch.manual_seed(0)
    network = build_network(config).eval()
    y = torch.tensor([3, 999])

    of_told, _ = process(name)
    last = 1000 if "huge" in name else 999
    times = last * np.arange(50, 0, -1) / 50
    alpha_bars = [*of_told(times), 1.0]
    network_without_time = build_network(config).eval()
    network_without_time.load_state_dict(network.state_dict())
    network_without_time.time_scale, network_without_time.time_shift = 1.0, 0.0
    x = SeededNoise([1, 2])(4, 4, 4)
    with torch.no_grad():
        for time, a, b in zip(times, alpha_bars, alpha_bars[1:], strict=False):
            time = torch.full((2,), time, dtype=torch.float32)
            cond = network_without_time(x, time, y)
            uncond = network_without_time(x, time, torch.full_like(y, 1000))
            eps = 1.4 * cond - 0.4 * uncond
            x = math.sqrt(b) * (x - math.sqrt(1 - a) * eps) / math.sqrt(a) + math.sqrt(1 - b) * eps

    schedule = NoiseSchedule(**config.diffusion_params.schedule)
    stage = Stage(guided(network, 0.4, config.no_class), spaced_timesteps(1000, 50))
    got = sample([stage], Solver("ddim", schedule), SeededNoise([1, 2]), (4, 4, 4), y)
    torch.testing.assert_close(got, x, rtol=1e-3, atol=1e-3)
