"""Values that change slowly over a stage: computed at every k-th step, and forecast at the steps between.

The methods that save calls within a stage forecast different values: the residual of the middle blocks of a network
(see `generation.denoisers`), the predicted noise itself (`held`), or the difference between the predictions of two
networks (`corrected`).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from diffusion.sampling import Denoiser


class Forecast:
    """A tensor computed at every k-th step, and its forecast in between.

    Order 0 holds the last value. Order 1 follows the line through the last two, in t: a Taylor series with a
    difference instead of the derivative, as in TaylorSeer (Liu et al. 2025, arXiv 2503.06923). With only one
    value it repeats that one.

    runs: falling timesteps, each run of which starts anew: nothing is carried over from the run before or from another
    batch. every: k; 1 computes at every step.
    """

    def __init__(self, runs: Sequence[Sequence[int]], every: int, order: int):
        self.order = order
        self.starts = {run[0] for run in runs if run}
        self.due = {t for run in runs for t in run[::every]}
        self.known: list[tuple[int, Tensor]] = []  # the last value, and with order 1 the one before it

    def is_due(self, t: int) -> bool:
        """Whether the value must be computed at t, for `note`."""
        return t in self.due

    def note(self, t: int, value: Tensor) -> None:
        """Keep a computed value, which must not be overwritten later."""
        before = [] if t in self.starts else self.known
        self.known = [*before, (t, value)][-1 - self.order :]

    def at(self, t: int) -> Tensor:
        """The forecast of the value at t."""
        return extrapolated(self.known, t)


def extrapolated(known: Sequence[tuple[int, Tensor]], t: int) -> Tensor:
    """The value at t on the line through two known ones, (t, value) each, or the one that is known."""
    last_t, last = known[-1]
    if len(known) == 1:
        return last
    before_t, before = known[0]
    return last + (t - last_t) / (last_t - before_t) * (last - before)


def held(denoiser: Denoiser, output: Forecast) -> Denoiser:
    """The denoiser, called where the output is due; its output, which must be eps, is forecast elsewhere."""

    def predict(x_t: Tensor, t: int, y: Tensor | None) -> Tensor:
        if not output.is_due(t):
            return output.at(t)
        eps = denoiser(x_t, t, y)
        output.note(t, eps)
        return eps

    return predict


def corrected(denoiser: Denoiser, cheap: Denoiser, difference: Forecast) -> Denoiser:
    """A cheap denoiser plus a forecast of what the other one adds: eps = cheap + D, D = denoiser - cheap.

    Where D is due both run, and the output is that of the denoiser itself. Both must predict eps.
    """

    def predict(x_t: Tensor, t: int, y: Tensor | None) -> Tensor:
        rough = cheap(x_t, t, y)
        if not difference.is_due(t):
            return rough + difference.at(t)
        eps = denoiser(x_t, t, y)
        difference.note(t, eps - rough)
        return eps

    return predict
