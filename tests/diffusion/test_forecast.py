"""Forecasts between computed steps: what is computed, what is carried on, and what is forgotten."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffusion.forecast import Forecast, corrected, held

TIMESTEPS = [19, 17, 16, 12, 11, 7, 3, 0]


def value_at(t: int, scale: float = 1.0) -> torch.Tensor:
    """A curve in t with no straight part, of three numbers."""
    return scale * torch.tensor([t**2 / 100, 2**-t, float(np.sin(t))], dtype=torch.float64)


def test_the_first_step_of_each_run_and_every_kth_after_it_are_due():
    runs = [[19, 18, 17, 16, 15], [9, 8], []]
    for every, due in ((1, {19, 18, 17, 16, 15, 9, 8}), (2, {19, 17, 15, 9}), (3, {19, 16, 9}), (100, {19, 9})):
        forecast = Forecast(runs, every, order=0)
        assert {t for t in range(20) if forecast.is_due(t)} == due


@pytest.mark.parametrize("order", [0, 1])
def test_a_forecast_is_the_interpolating_polynomial_of_the_last_values(order):
    forecast = Forecast([TIMESTEPS], 3, order)
    computed: list[int] = []
    for t in TIMESTEPS:
        if forecast.is_due(t):
            forecast.note(t, value_at(t))
            computed.append(t)
        used = computed[-1 - order :]
        degree = len(used) - 1  # until there are two values, there is no line
        coefficients = np.polyfit(used, np.stack([value_at(u).numpy() for u in used]), degree)
        wanted = sum(c * t ** (degree - n) for n, c in enumerate(coefficients))
        np.testing.assert_allclose(forecast.at(t).numpy(), wanted, rtol=1e-9, atol=1e-12)
    assert computed == [19, 12, 3]


def test_nothing_is_carried_into_another_run_or_batch():
    forecast = Forecast([[9, 8, 7, 6], [5, 4, 3]], 2, order=1)
    for batch in (1.0, -3.0):
        for t in (9, 7):
            forecast.note(t, value_at(t, batch))
        assert not torch.equal(forecast.at(6), value_at(7, batch)), "two values are known, so it goes on along a line"
        forecast.note(5, value_at(5, batch))
        assert torch.equal(forecast.at(4), value_at(5, batch)), "of the new run one value is known, which is held"


class Counting:
    def __init__(self, slope: float):
        self.slope, self.asked = slope, []

    def __call__(self, x_t, t, y):
        self.asked.append(t)
        return self.slope * x_t + value_at(t) + (0 if y is None else y)


X = torch.tensor([[0.3, -1.0, 2.0], [1.0, 0.0, -0.5]], dtype=torch.float64)
Y = torch.tensor([[2.0], [5.0]], dtype=torch.float64)


@pytest.mark.parametrize("order", [0, 1])
def test_every_1_is_the_plain_network_bit_for_bit(order):
    for t in TIMESTEPS:
        full, cheap = Counting(0.7), Counting(0.4)
        plain = full(X, t, Y)
        assert torch.equal(held(full, Forecast([TIMESTEPS], 1, order))(X, t, Y), plain)
        assert torch.equal(corrected(full, cheap, Forecast([TIMESTEPS], 1, order))(X, t, Y), plain)


def test_a_held_network_runs_where_its_output_is_due():
    network = Counting(0.7)
    denoiser = held(network, Forecast([TIMESTEPS], 3, order=0))
    outputs = [denoiser(X + t, t, Y) for t in TIMESTEPS]
    assert network.asked == [19, 12, 3]
    for t, output in zip(TIMESTEPS, outputs, strict=True):
        before = min(u for u in network.asked if u >= t)
        torch.testing.assert_close(output, 0.7 * (X + before) + value_at(before) + Y)


def test_a_corrected_network_adds_the_difference_last_seen():
    """Both networks are lines in x with one offset, so that the difference is that of their slopes times x."""
    full, cheap = Counting(0.7), Counting(0.4)
    denoiser = corrected(full, cheap, Forecast([TIMESTEPS], 3, order=0))
    outputs = [denoiser(X + t, t, Y) for t in TIMESTEPS]
    assert (full.asked, cheap.asked) == ([19, 12, 3], TIMESTEPS)
    for t, output in zip(TIMESTEPS, outputs, strict=True):
        before = min(u for u in full.asked if u >= t)
        torch.testing.assert_close(output, 0.4 * (X + t) + value_at(t) + Y + 0.3 * (X + before))


def test_a_line_is_forecast_exactly():
    """If the difference changes as a line in t, order 1 has no error once two values are known."""
    full, cheap = Counting(0.7), Counting(0.4)
    denoiser = corrected(full, cheap, Forecast([TIMESTEPS], 3, order=1))
    for t in TIMESTEPS:
        output = denoiser(X + t, t, Y)
        if t <= 12:
            torch.testing.assert_close(output, 0.7 * (X + t) + value_at(t) + Y)
    assert full.asked == [19, 12, 3]
