"""An exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from training.parallel import like, local


class Ema:
    """Averages of the trained parameters.

    decay: the final decay; it rises as (1 + step) / (10 + step), so that the average forgets the first steps.
    """

    def __init__(self, network: nn.Module, decay: float):
        self.decay = decay
        self.parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self.averages = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self, step: int, taken: Tensor | None = None) -> None:
        """Add the weights after `step` optimiser steps to the averages.

        taken: 0-d bool, whether the last step changed the weights; if not, nothing changes. It is not read on the host.
        """
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        averages, goals = ([local(t) for t in d.values()] for d in (self.averages, self.parameters))
        if taken is not None:
            goals = [torch.where(taken, p, a) for p, a in zip(goals, averages, strict=True)]
        torch._foreach_lerp_(averages, goals, weight)

    def load(self, averages: Mapping[str, Tensor]) -> None:
        for name, average in self.averages.items():
            average.copy_(like(averages[name], average))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """A context in which the network has the averaged weights."""
        raw = {name: p.detach().clone() for name, p in self.parameters.items()}
        try:
            self._put(self.averages)
            yield
        finally:
            self._put(raw)

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])
