"""The public U-ViT weights: their time inputs, their schedule, their classes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from common.config import build_config, read_yaml
from diffusion import NoiseSchedule
from diffusion.sampling import SeededNoise, guided, sample
from diffusion.solvers import Solver, spaced_timesteps
from models.loading import build_network

CONFIGS = Path(__file__).parents[1] / "configs"


def public(name: str, **small):
    settings = read_yaml(CONFIGS / f"uvit_{name}_public.yaml")
    settings["model_params"] |= small
    return build_config(settings, name)


@pytest.mark.parametrize(
    "name, first, last", [("celeba", 0.999, 999), ("cifar10", 0.999, 999), ("imagenet256", 1, 1000)]
)
def test_time_inputs(name, first, last, monkeypatch):
    network = build_network(public(name, embed_dim=32, num_heads=4, depth=1))
    seen = []
    embedding = "models.uvit.timestep_embedding"
    monkeypatch.setattr(embedding, lambda t, dim: seen.append(t.tolist()) or torch.zeros(len(t), dim))
    x = torch.zeros(2, *network.config.image_shape)
    y = torch.tensor([0, 1000]) if name == "imagenet256" else None
    network(x, torch.tensor([0, 999]), y)
    assert seen[0] == pytest.approx([first, last])


def test_classes_of_imagenet():
    config = public("imagenet256")
    assert config.classes == range(1000) and config.no_class == 1000
    assert public("celeba").no_class is None and public("celeba").crop == "uvit128"


def test_imagenet_256_takes_the_published_trajectory():
    """DDIM with guidance 0.4 from the published schedule, written without the project's code."""
    config = public("imagenet256", embed_dim=32, num_heads=4, depth=3, img_size=4)
    torch.manual_seed(0)
    network = build_network(config).eval()
    y = torch.tensor([3, 999])
    timesteps = spaced_timesteps(1000, 50)

    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha_bar = (1 - beta).cumprod(0)
    network_without_time = build_network(config).eval()
    network_without_time.load_state_dict(network.state_dict())
    network_without_time.time_scale, network_without_time.time_shift = 1.0, 0.0
    x = SeededNoise([1, 2])(4, 4, 4)
    with torch.no_grad():
        for n, t in enumerate(range(999, -1, -20)):
            time = torch.full((2,), t + 1.0)
            cond = network_without_time(x, time, y)
            uncond = network_without_time(x, time, torch.full_like(y, 1000))
            eps = 1.4 * cond - 0.4 * uncond
            a, b = alpha_bar[t].item(), alpha_bar[t - 20].item() if n < 49 else 1.0
            x = math.sqrt(b) * (x - math.sqrt(1 - a) * eps) / math.sqrt(a) + math.sqrt(1 - b) * eps
    assert timesteps == list(range(999, -1, -20))

    schedule = NoiseSchedule(**config.diffusion_params.schedule)
    denoiser = guided(network, 0.4, config.no_class)
    got = sample(denoiser, Solver("ddim", schedule), timesteps, SeededNoise([1, 2]), (4, 4, 4), y)
    torch.testing.assert_close(got, x, rtol=1e-3, atol=1e-3)
