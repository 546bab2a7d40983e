"""Choose the network for each timestep, by its time and its divergence.

An option assigns a network to every step. It saves time, and its divergence (or squared shift, see
diffusion.divergence) from the full network alone is the sum over its steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

from common.errors import InputError

KNEE_RATIO = 1.5  # the knee: the last switch whose divergence per second saved is at most this times the average so far


@dataclass(frozen=True, eq=False)
class Steps:
    """K networks, the full one last, and S steps of one sampler.

    timesteps: (S,), falling. costs: (K,) seconds of a call. divergence, excess: (K, S, N) of each of N images, per
    dimension; NaN if a network cannot run, 0 for the full one.
    """

    timesteps: Sequence[int]
    costs: np.ndarray
    divergence: np.ndarray
    excess: np.ndarray

    @property
    def full(self) -> int:
        return len(self.costs) - 1

    @property
    def seconds_full(self) -> float:
        return float(self.costs[-1] * len(self.timesteps))


@dataclass(frozen=True, eq=False)
class Option:
    """A network for each step, and its results: means over images and standard errors, per dimension."""

    networks: np.ndarray  # (S,) number of the network at each step
    speed_up: float  # predicted from the times of calls
    divergence: float
    divergence_se: float
    excess: float
    excess_se: float

    def t_switch(self, timesteps: Sequence[int]) -> int:
        """Of two networks: the full one runs at every t <= this one."""
        return next((t for t, k in zip(timesteps, self.networks, strict=True) if k), -1)


def evaluated(steps: Steps, networks: np.ndarray) -> Option:
    """The option of these networks. networks: (S,)."""
    places = networks, np.arange(len(networks))
    divergence, excess = (table[places].sum(axis=0) for table in (steps.divergence, steps.excess))  # (N,)
    return Option(
        networks,
        steps.seconds_full / float(steps.costs[networks].sum()),
        *map(float, mean_and_se(divergence)),
        *map(float, mean_and_se(excess)),
    )


def mean_and_se(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard error over images, or seeds: (..., N) -> (...), (...)."""
    return values.mean(axis=-1), values.std(axis=-1, ddof=1) / values.shape[-1] ** 0.5


def switches(steps: Steps) -> list[Option]:
    """For two networks, the option of each possible switch, the latest switch last."""
    able = np.isfinite(steps.divergence[0]).all(axis=-1)
    most = int(np.argmin(able)) if not able.all() else len(able)  # most steps of the shallow network from the start
    orders = (np.where(np.arange(len(able)) < n, 0, 1) for n in range(most + 1))
    return [evaluated(steps, order) for order in orders]


def cascades(steps: Steps, free: bool) -> list[Option]:
    """For any number of networks, the choices that are best at some price lambda of a second.

    Each makes the sum of divergence + lambda * seconds the least: among all choices if free, else among those that
    go from the first network to the last as t falls. All of them are found, by taking two neighbours and asking for
    the best at the price at which these two are equal.
    """
    divergence = steps.divergence.mean(axis=-1)  # (K, S)
    # NaN (the network cannot run) becomes a cost above all others.
    forbidden = 1 + 10 * np.nansum(divergence)

    def best(price: float) -> np.ndarray:
        per_step = divergence + price * steps.costs[:, None]
        per_step = np.where(np.isnan(per_step), forbidden * (1 + price * steps.seconds_full), per_step)
        return per_step.argmin(axis=0) if free else least_in_order(per_step)

    def totals(networks: np.ndarray) -> tuple[float, float]:
        return float(divergence[networks, np.arange(len(networks))].sum()), float(steps.costs[networks].sum())

    full = np.full(len(steps.timesteps), steps.full)
    # If a second costs more than all divergence together, the cheapest networks run.
    least_step = np.diff(np.unique(steps.costs)).min(initial=steps.costs.max())
    found = {tuple(networks): networks for networks in (full, best(2 * forbidden / least_step))}
    pairs = [tuple(found.values())] if len(found) == 2 else []
    while pairs:
        slow, quick = pairs.pop()
        (d_slow, c_slow), (d_quick, c_quick) = totals(slow), totals(quick)
        if not c_slow > c_quick:
            continue
        price = (d_quick - d_slow) / (c_slow - c_quick)
        between = best(price)
        d, c = totals(between)
        if tuple(between) not in found and d + price * c < (d_slow + price * c_slow) * (1 - 1e-12):
            found[tuple(between)] = between
            pairs += [(slow, between), (between, quick)]
    return sorted((evaluated(steps, networks) for networks in found.values()), key=lambda option: option.speed_up)


def least_in_order(per_step: np.ndarray) -> np.ndarray:
    """(S,) of networks that never fall, with the least sum of per_step (K, S).

    Dynamic programming over the networks: reached[n] is the least for the first n steps, with network k the last of
    them, or before it.
    """
    count = per_step.shape[1]
    sums = np.concatenate([np.zeros((len(per_step), 1)), per_step.cumsum(axis=1)], axis=1)  # (K, S + 1)
    reached, starts = sums[0], []
    for own in sums[1:]:
        gain = reached - own  # of beginning with this network after n steps
        so_far = np.minimum.accumulate(gain)
        starts.append(np.maximum.accumulate(np.where(gain <= so_far, np.arange(count + 1), 0)))
        reached = so_far + own
    networks, end = np.zeros(count, int), count
    for k in range(len(starts), 0, -1):
        begin = starts[k - 1][end]
        networks[begin:end] = k
        end = begin
    return networks


def choose(options: Sequence[Option], speed_up: float | None = None, budget: float | None = None) -> Option:
    """The option with the least divergence that is at least so fast, the fastest within the budget, or the knee.

    options: rising in speed, the full network alone first. budget: of divergence. Raises InputError if none is so
    fast.
    """
    if speed_up is not None:
        check_reachable(options, speed_up)
        return min((o for o in options if o.speed_up >= speed_up), key=lambda option: option.divergence)
    if budget is not None:
        able = [option for option in options if option.divergence <= budget]
        return max(able, key=lambda option: option.speed_up)  # the full network alone is always within
    return knee(options)


def check_reachable(options: Sequence[Option], speed_up: float) -> None:
    """Raises InputError if no option is so fast."""
    if (most := max(option.speed_up for option in options)) < speed_up:
        raise InputError(f"--speedup {speed_up:g}: the largest speed-up of these networks is {most:.2f}")


class Priced(Protocol):
    """Anything with a speed-up and a divergence."""

    @property
    def speed_up(self) -> float: ...
    @property
    def divergence(self) -> float: ...


P = TypeVar("P", bound=Priced)


def knee(options: Sequence[P]) -> P:
    """The last option whose divergence per second saved is at most KNEE_RATIO times the average so far.

    The price of time is the divergence that the step to an option adds, over the time that this step saves; it is
    held against the mean price of all time saved up to there. The ratio is the slope of the curve in logarithms: 1
    where divergence grows with the time saved, 2 where it grows as its square. Of two networks that switch once every
    step saves the same time, so that times cancel: a step's divergence is held against the mean of all up to it.
    Unlike the point farthest from the chord (Satopaa et al. 2011) the knee does not depend on how far the curve goes
    on beyond, and noise close to the image makes divergence go very far.
    """
    slowest, chosen, before = options[0], options[0], options[0]
    for option in options[1:]:
        saved, saved_here = (1 / other.speed_up - 1 / option.speed_up for other in (slowest, before))
        if saved_here <= 0:  # no quicker than the one before
            continue
        price = (option.divergence - slowest.divergence) / saved
        price_here = (option.divergence - before.divergence) / saved_here
        if price_here <= KNEE_RATIO * price:
            chosen = option
        before = option
    return chosen


def chosen_of_other_images(
    steps: Steps,
    options: Sequence[Option],
    speed_up: float | None = None,
    budget: float | None = None,
    draws: int = 200,
) -> list[Option]:
    """The choices of `choose` for images resampled with replacement (the bootstrap).

    Their spread shows the uncertainty of the choice.
    """
    places = np.arange(len(steps.timesteps))
    per_image = np.array([steps.divergence[option.networks, places].sum(axis=0) for option in options])  # (O, N)
    count = per_image.shape[1]
    drawn = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=draws) / count  # (draws, N)
    chosen = []
    for means in drawn @ per_image.T:
        others = [dataclasses.replace(o, divergence=float(mean)) for o, mean in zip(options, means, strict=True)]
        chosen.append(options[others.index(choose(others, speed_up, budget))])
    return chosen
