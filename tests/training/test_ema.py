from __future__ import annotations

import torch
from torch import nn

from training.ema import Ema


def test_the_average_rises_to_its_decay():
    network = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(network.weight)
    ema = Ema(network, decay=0.9)
    want = 0.0
    for step in range(1, 200):
        nn.init.constant_(network.weight, float(step))
        ema.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        want = decay * want + (1 - decay) * step
    torch.testing.assert_close(ema.averages["weight"].item(), want, rtol=1e-5, atol=1e-5)


def test_in_place_is_undone_even_after_an_error():
    network = nn.Linear(1, 1)
    ema = Ema(network, decay=0.5)
    nn.init.constant_(network.weight, 7.0)
    try:
        with ema.in_place():
            assert torch.equal(network.weight, ema.averages["weight"])
            raise KeyError
    except KeyError:
        pass
    assert network.weight.item() == 7.0


def test_frozen_parameters_are_not_averaged():
    network = nn.Linear(1, 1)
    network.bias.requires_grad_(False)
    assert list(Ema(network, 0.9).averages) == ["weight"]
