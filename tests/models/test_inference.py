from __future__ import annotations

import pytest
import torch

from diffusion.forecast import Forecast
from generation.denoisers import reusing
from models.early_exit import EarlyExitUViT
from models.inference import BackboneDenoiser, EarlyExitTracer
from models.uvit import UViT
from tests.conftest import TINY, perturbed

CPU = torch.device("cpu")
TIMESTEPS = [999, 998, 500, 0]
TIMES = {t: t for t in TIMESTEPS}  # the networks' own: the schedule is theirs


def make(depth: int = 3, **changes) -> UViT:
    return perturbed(UViT(**TINY, depth=depth, **changes)).eval().requires_grad_(False)


def make_early_exit() -> EarlyExitUViT:
    torch.manual_seed(0)
    return perturbed(EarlyExitUViT(UViT(**TINY, depth=5), "mlp_probe_per_layer")).eval().requires_grad_(False)


def threshold_for(model: EarlyExitUViT, x: torch.Tensor) -> float:
    """One that some images never come below, as far from what the probes say as can be."""
    lowest = model(x, 500).uncertainty.amin(dim=0).sort().values
    widest = int(lowest.diff().argmax())
    return float(lowest[widest : widest + 2].mean())


@pytest.mark.parametrize("changes", [{}, {"num_classes": 3}, {"mlp_time_embed": True, "normalize_timesteps": True}])
@torch.inference_mode()
def test_in_fp32_it_is_the_network(changes):
    uvit, x = make(**changes), torch.randn(4, 1, 8, 8)
    y = torch.tensor([0, 1, 2, 0]) if "num_classes" in changes else None
    denoiser = BackboneDenoiser(uvit, TIMES, torch.float32, CPU)
    for t in TIMESTEPS:
        torch.testing.assert_close(denoiser(x, t, y), uvit(x, t, y))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.03), (torch.float16, 0.004)])
@torch.inference_mode()
def test_half_precision_is_near_and_gives_fp32(dtype, tolerance):
    """Eight or eleven bits of a number, a few roundings in a row: errors of a few 2^-8 or 2^-11 of the scale."""
    uvit, x = UViT(**TINY, depth=3).eval(), torch.randn(4, 1, 8, 8)
    want = uvit(x, 500)
    got = BackboneDenoiser(uvit, TIMES, dtype, CPU)(x, 500, None)
    assert got.dtype == torch.float32
    assert uvit.pos_embed.dtype == dtype
    assert 0 < (got - want).abs().max() < tolerance * want.abs().max()


def test_neighbouring_timesteps_stay_apart_in_half_precision():
    """bf16 has no 998: the sinusoids are made of the exact number."""
    uvit = make()
    exact = uvit.time_tokens(torch.tensor(TIMESTEPS))
    tokens = BackboneDenoiser(uvit, TIMES, torch.bfloat16, CPU).time_tokens
    assert not torch.equal(tokens[999], tokens[998])
    torch.testing.assert_close(torch.cat([tokens[t] for t in TIMESTEPS]).float(), exact, rtol=0, atol=2**-8)


@torch.inference_mode()
def test_early_exit_in_half_precision_leaves_where_fp32_does():
    x = torch.randn(6, 1, 8, 8)
    model = make_early_exit()
    threshold = threshold_for(model, x)
    want = model.trace_early_exit(x, 500, threshold=threshold)
    tracer = EarlyExitTracer(model, TIMES, torch.bfloat16, CPU, threshold=threshold)
    got = tracer(x, 500, None)
    assert got.output.dtype == torch.float32
    assert len(want.exit_layer.unique()) > 1, "the case is of no use if all leave at one layer"
    assert torch.equal(got.exit_layer, want.exit_layer)
    assert (got.output - want.output).abs().max() < 0.1 * want.output.abs().max()


@torch.inference_mode()
@pytest.mark.slow
def test_compiled_and_eager_agree():
    """Also for a last batch of another size, and for batches that shrink on the way."""
    x = torch.randn(6, 1, 8, 8)
    uvit = make()
    eager, compiled = (BackboneDenoiser(uvit, TIMES, torch.float32, CPU, compiled=c) for c in (False, True))
    for t, images in ((999, x), (0, x), (500, x[:2])):
        torch.testing.assert_close(compiled(images, t, None), eager(images, t, None), rtol=1e-4, atol=1e-4)

    model = make_early_exit()
    threshold = threshold_for(model, x)
    want = EarlyExitTracer(model, TIMES, torch.float32, CPU, threshold=threshold)(x, 500, None)
    tracer = EarlyExitTracer(model, TIMES, torch.float32, CPU, threshold=threshold, compiled=True)
    got = tracer(x, 500, None)
    assert len(want.exit_layer.unique()) > 1, "the case is of no use if all leave at one layer"
    assert torch.equal(got.exit_layer, want.exit_layer)
    torch.testing.assert_close(got.output, want.output, rtol=1e-4, atol=1e-3)


@torch.inference_mode()
@pytest.mark.slow
def test_the_cache_compiled_and_in_half_precision():
    x, uvit = torch.randn(4, 1, 8, 8), UViT(**TINY, depth=5).eval()

    def run(dtype=torch.float32, compiled=False):
        network = BackboneDenoiser(uvit, TIMES, dtype, CPU, compiled=compiled)
        denoiser = reusing(network.around(1), Forecast([TIMESTEPS], 2, order=0))
        return torch.stack([denoiser(images, t, None)[:2] for images in (x, x[:2]) for t in TIMESTEPS])

    want = run()
    torch.testing.assert_close(run(compiled=True), want, rtol=1e-4, atol=1e-4)
    half = run(torch.bfloat16)
    assert half.dtype == torch.float32 and 0 < (half - want).abs().max() < 0.03 * want.abs().max()
