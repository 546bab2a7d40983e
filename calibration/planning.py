"""The best plan, by dynamic programming over the steps and the predictions that are remembered at each step.

A *way* predicts the noise of a step at some cost in seconds and some divergence from the full network. A way that
remembers has a period: its first step computes, the others forecast (`diffusion.forecast`), and in the first period
of a stage it remembers less than later. So a state of the program is a way, a place in its period, and whether this
period is the first. From each state a plan goes on in its way, or begins a stage of any way.

The divergence of a plan is the sum over its steps. For a sampler that draws noise this is exact, whatever the plan
remembers: by the chain rule the divergence of the paths is the expected sum, along paths of the full network, of the
divergence of each step given the path so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from calibration.choice import mean_and_se
from common.errors import InputError
from generation.settings import SavingSettings

Numbers = NDArray[np.float64]
MOST_LABELS = 100_000  # most partial plans in a step of `least`; with more the result is less exact
SLACK = 1e-9  # of a sum that must not be more than a limit


@dataclass(frozen=True, eq=False)
class Way:
    """A way to predict the noise in a stage.

    name: for tables. mechanism: "network", "correct", "reuse", "hold" or "exit". network, cheap, saving: see
    `generation.stages.PlannedStage`. seconds: (P,) of a step, by its place in the period of P steps. rows: (2, P) of
    `Prices.divergence`, in the first period of a stage and in later ones.
    """

    name: str
    mechanism: str
    network: int
    saving: SavingSettings
    cheap: int | None
    seconds: Numbers
    rows: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Prices:
    """The costs of the ways at each of S steps.

    timesteps: (S,), falling. divergence: (R, S, N) of each of N paths, per dimension; NaN if it cannot be had.
    ways: the full network alone first. overhead: seconds of a step outside of the networks.
    """

    timesteps: Sequence[int]
    divergence: Numbers
    ways: Sequence[Way]
    overhead: float = 0.0

    @property
    def seconds_full(self) -> float:
        return len(self.timesteps) * (float(self.ways[0].seconds[0]) + self.overhead)

    def has(self, mechanism: str) -> bool:
        """Whether a way other than the full network alone is of this mechanism."""
        return any(way.mechanism == mechanism for way in self.ways[1:])

    def only(self, mechanism: str) -> Prices:
        """The prices of the full network and of one mechanism; smaller networks do not run alone."""
        full = self.ways[0].network
        smaller_too = mechanism in ("network", "exit")
        ways = [way for way in self.ways[1:] if way.mechanism == mechanism and (smaller_too or way.network == full)]
        ways.insert(0, self.ways[0])
        return Prices(self.timesteps, self.divergence, ways, self.overhead)

    @cached_property
    def states(self) -> States:
        return States(self)


class States:
    """All states of the program, J of them, as arrays.

    way, row: (J,) of each state. following: (J,) the state after it in the same way. starts: (W,) the first state of
    each way. later: (W,) the first of its later periods. seconds: (S, J). divergence: (S, J), the mean over paths;
    infinite if the way is impossible.
    """

    def __init__(self, prices: Prices):
        way: list[int] = []
        row: list[int] = []
        following: list[int] = []
        starts: list[int] = []
        later: list[int] = []
        seconds: list[float] = []
        for n, of in enumerate(prices.ways):
            starts.append(len(way))
            period = len(of.seconds)
            begin = starts[-1] + period  # of its later periods
            later.append(begin)
            following += [*range(starts[-1] + 1, begin), begin, *range(begin + 1, begin + period), begin]
            way += [n] * 2 * period
            row += of.rows.ravel().tolist()
            seconds += [*of.seconds, *of.seconds]
        self.way, self.row, self.following = map(np.array, (way, row, following))
        self.starts, self.later = map(np.array, (starts, later))
        steps = len(prices.timesteps)
        self.seconds = np.tile(np.array(seconds) + prices.overhead, (steps, 1))
        mean = prices.divergence.mean(axis=-1).T  # (S, R)
        self.divergence = np.where(np.isnan(mean), np.inf, mean)[:, self.row]

    def to_go(self, per_step: Numbers) -> Numbers:
        """(S + 1, J): the least sum of per_step (S, J) from a state and step to the end."""
        least = np.zeros((len(per_step) + 1, per_step.shape[1]))
        for s in range(len(per_step) - 1, -1, -1):
            least[s] = per_step[s] + np.minimum(least[s + 1][self.following], least[s + 1][self.starts].min())
        return least

    def path(self, to_go: Numbers) -> NDArray[np.int64]:
        """(S,) states of the least sum, from the result of `to_go`. It keeps its way if it can."""
        states = np.empty(len(to_go) - 1, int)
        for s in range(len(states)):
            new = self.starts[to_go[s][self.starts].argmin()]
            old = self.following[states[s - 1]] if s else new
            states[s] = old if to_go[s][old] <= to_go[s][new] else new
        return states

    def total(self, per_step: Numbers, states: NDArray[np.int64]) -> float:
        return float(per_step[np.arange(len(states)), states].sum())

    def at_price(self, first: Numbers, second: Numbers, price: float) -> NDArray[np.int64]:
        """The states with the least sum of first + price * second, (S, J) each."""
        return self.path(self.to_go(first + price * second))


@dataclass(frozen=True, eq=False)
class PlanOption:
    """A plan: its states and its costs. Means over paths and standard errors, per dimension."""

    states: NDArray[np.int64]  # (S,)
    seconds: float  # of all steps
    speed_up: float
    divergence: float
    divergence_se: float


def option_of(prices: Prices, states: NDArray[np.int64]) -> PlanOption:
    of = prices.states
    places = np.arange(len(states))
    seconds = of.total(of.seconds, states)
    mean, se = mean_and_se(prices.divergence[of.row[states], places].sum(axis=0))
    return PlanOption(states, seconds, prices.seconds_full / seconds, float(mean), float(se))


def frontier(prices: Prices, most: int = 200) -> list[PlanOption]:
    """The plans that are best at some price of a second, rising in speed, the full network alone first.

    most: of the prices that are tried, where the plans lie the farthest apart.
    """
    of = prices.states
    whole = full_alone(of)
    quick = of.at_price(np.where(np.isinf(of.divergence), np.inf, 0.0), of.seconds, 1.0)
    found = {tuple(states): states for states in (whole, quick)}

    def totals(states: NDArray[np.int64]) -> tuple[float, float]:
        return of.total(of.divergence, states), of.total(of.seconds, states)

    pairs = [(whole, quick)]
    while pairs and len(found) < most:
        pairs.sort(key=lambda pair: abs(totals(pair[0])[1] - totals(pair[1])[1]))
        slow, fast = pairs.pop()
        (d_slow, c_slow), (d_fast, c_fast) = totals(slow), totals(fast)
        if not c_slow > c_fast:
            continue
        price = max(d_fast - d_slow, 0.0) / (c_slow - c_fast)
        between = of.at_price(of.divergence, of.seconds, price)
        d, c = totals(between)
        if tuple(between) not in found and d + price * c < (d_slow + price * c_slow) * (1 - 1e-12):
            found[tuple(between)] = between
            pairs += [(slow, between), (between, fast)]
    options = sorted((option_of(prices, states) for states in found.values()), key=lambda o: (o.speed_up, o.divergence))
    kept: list[PlanOption] = []
    for option in reversed(options):  # drop options that a faster one beats
        if not kept or option.divergence < kept[-1].divergence:
            kept.append(option)
    return kept[::-1]


def full_alone(of: States) -> NDArray[np.int64]:
    """(S,) states of the full network at every step."""
    states = np.full(len(of.divergence), of.following[of.starts[0]])
    states[0] = of.starts[0]
    return states


def best_plan(prices: Prices, *, seconds: float | None = None, budget: float | None = None) -> PlanOption:
    """The plan with the least divergence in so many seconds, or the fastest plan within a budget of divergence.

    seconds: of all steps. budget: of mean divergence, per dimension. Raises InputError if no plan is so fast.
    """
    of = prices.states
    if seconds is not None:
        possible = np.where(np.isinf(of.divergence), np.inf, of.seconds)
        least_seconds = float(of.to_go(possible)[0][of.starts].min())
        if least_seconds > seconds * (1 + SLACK):
            raise InputError(
                f"no plan is as fast as {seconds:.3g} s; the fastest takes {least_seconds:.3g} s, "
                f"{prices.seconds_full / least_seconds:.2f} times as fast as the full network"
            )
        return option_of(prices, least(of, of.divergence, possible, seconds))
    assert budget is not None, "neither seconds nor a budget"
    return option_of(prices, least(of, of.seconds, of.divergence, budget))


def least(of: States, first: Numbers, second: Numbers, limit: float) -> NDArray[np.int64]:
    """(S,) states with the least sum of `first` among those whose sum of `second` is at most the limit; there is one.

    A price of `second` that makes the sum of both the least brackets the answer between two neighbours on the convex
    hull (Lagrangian relaxation). What may lie between them is found exactly: plans under way, from the first step on,
    are dropped where another in the same state is no worse in both sums, and where even the best continuation at that
    price could not beat what is known (Handler and Zang 1980, for constrained shortest paths).
    """
    first = np.where(np.isinf(second), np.inf, first)
    second = np.where(np.isinf(first), np.inf, second)
    limit *= 1 + SLACK
    ends = {"cheap": of.path(of.to_go(first)), "able": of.path(of.to_go(second))}
    if of.total(second, ends["cheap"]) <= limit:
        return ends["cheap"]
    price = 0.0
    while True:
        (f_cheap, s_cheap), (f_able, s_able) = (
            (of.total(first, states), of.total(second, states)) for states in ends.values()
        )
        if not s_cheap > s_able or f_able <= f_cheap:
            break
        price = (f_able - f_cheap) / (s_cheap - s_able)
        between = of.at_price(first, second, price)
        f, s = of.total(first, between), of.total(second, between)
        if not f + price * s < (f_able + price * s_able) * (1 - 1e-12):
            break
        ends["able" if s <= limit else "cheap"] = between
    return _between(of, first, second, limit, price, ends["able"])


def _between(
    of: States, first: Numbers, second: Numbers, limit: float, price: float, known: NDArray[np.int64]
) -> NDArray[np.int64]:
    """The answer of `least`, by extending plans step by step. known: a plan within the limit."""
    bound, second_to_go = of.to_go(first + price * second), of.to_go(second)
    best = of.total(first, known)
    state, parent = of.starts.copy(), np.full(len(of.starts), -1)
    sums = np.zeros((2, len(state)))  # of first and second, before the step of the state
    history: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    for s in range(len(first)):
        hope = sums[0] + bound[s, state] + price * (sums[1] - limit)
        able = (sums[1] + second_to_go[s, state] <= limit) & (hope < best * (1 - 1e-12))
        if able.sum() > MOST_LABELS:
            able &= hope <= np.partition(hope[able], MOST_LABELS)[MOST_LABELS]
        keep = np.flatnonzero(able)
        keep = keep[_undominated(state[keep], *sums[:, keep])]
        if not len(keep):
            return known
        state, parent, sums = state[keep], parent[keep], sums[:, keep]
        history.append((state, parent))
        sums = sums + np.stack([first[s, state], second[s, state]])
        # Continue the same way, or begin a new stage, which does not depend on the way before.
        free = _undominated(np.zeros(len(state), int), *sums)
        parent = np.concatenate([np.arange(len(state)), np.repeat(free, len(of.starts))])
        state = np.concatenate([of.following[state], np.tile(of.starts, len(free))])
        sums = sums[:, parent]
    finished = sums[1] <= limit
    if not finished.any() or sums[0][finished].min() >= best:
        return known
    place = int(parent[np.flatnonzero(finished)[sums[0][finished].argmin()]])
    states = np.empty(len(first), int)
    for s in range(len(first) - 1, -1, -1):
        of_step, parents = history[s]
        states[s], place = of_step[place], int(parents[place])
    return states


def _undominated(state: NDArray[np.int64], first: Numbers, second: Numbers) -> NDArray[np.int64]:
    """Positions of the plans that no other one in the same state equals or beats in both sums."""
    order = np.lexsort((first, second, state))
    group = state[order]
    # The running minimum of `first` within a state: a lower offset of each next group starts it anew.
    offset = np.cumsum(np.concatenate([[0], np.diff(group) != 0])) * (2 * np.abs(first).max(initial=0) + 1)
    values = first[order] - offset
    before = np.concatenate([[np.inf], np.minimum.accumulate(values)[:-1]])
    undominated: NDArray[np.int64] = order[values < before]
    return undominated


def stages_of_states(prices: Prices, states: NDArray[np.int64]) -> list[tuple[Way, int]]:
    """The stages of a plan: each way, and the position of its first step."""
    of = prices.states
    stages: list[tuple[Way, int]] = []
    for s, state in enumerate(states):
        way, on = prices.ways[of.way[state]], of.following[states[s - 1]]
        # At the end of a period, a new stage of the same way is no new stage if periods remember nothing of each other.
        alike = s > 0 and of.way[on] == of.way[state] and on in of.later and (way.rows[0] == way.rows[1]).all()
        if s == 0 or not (on == state or (alike and state in of.starts)):
            stages.append((way, s))
    return stages
