"""The plan of the dynamic program is the best of all plans, for every limit."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from calibration.planning import Prices, Way, best_plan, frontier, option_of, stages_of_states
from common.errors import InputError
from generation.settings import SavingSettings

STEPS = 5


def prices_of(seed: int, steps: int = STEPS, intervals: tuple[int, ...] = (2, 3)) -> Prices:
    """A full network, a shallow one, and ways of each interval with random prices; rising with age, lower later on."""
    random = np.random.default_rng(seed)
    rows = [np.zeros((steps, 2))]

    def row(scale: float) -> int:
        rows.append(np.repeat(scale * random.exponential(size=(steps, 1)), 2, axis=1))
        return len(rows) - 1

    def way(name: str, mechanism: str, seconds, rows_of) -> Way:
        return Way(name, mechanism, 0, SavingSettings(), None, np.array(seconds, float), np.array(rows_of))

    shallow = row(1)
    ways = [way("full", "network", [4], [[0], [0]]), way("shallow", "network", [1], [[shallow], [shallow]])]
    for k in intervals:
        for name, seconds, scales in (
            ("correct", [5, *[1] * (k - 1)], (0.3, 0.1)),
            ("hold", [4, *[0] * (k - 1)], (1, 1)),
        ):
            of = [[0, *(row(scale * age) for age in range(1, k))] for scale in scales]
            ways.append(way(f"{name} {k}", name, seconds, of))
    return Prices(list(range(steps - 1, -1, -1)), np.array(rows), ways, overhead=0.25)


def every_plan(prices: Prices) -> tuple[np.ndarray, np.ndarray]:
    """Divergence and seconds of every way to cut the steps into stages and to choose a way for each, by hand."""
    found = []
    steps = len(prices.timesteps)
    for cuts in itertools.chain.from_iterable(itertools.combinations(range(1, steps), n) for n in range(steps)):
        bounds = list(itertools.pairwise([0, *cuts, steps]))
        for ways in itertools.product(prices.ways, repeat=len(bounds)):
            divergence = seconds = 0.0
            for (start, end), way in zip(bounds, ways, strict=True):
                for n, step in enumerate(range(start, end)):
                    period = len(way.seconds)
                    row = way.rows[0 if n < period else 1, n % period]
                    divergence += prices.divergence[row, step].mean()
                    seconds += way.seconds[n % period] + prices.overhead
            found.append((divergence, seconds))
    return tuple(np.array(found).T)


@pytest.mark.parametrize("seed", range(4))
def test_no_plan_is_better_at_any_limit(seed):
    prices = prices_of(seed)
    divergence, seconds = every_plan(prices)
    for limit in np.unique(seconds.round(6))[::3]:
        plan = best_plan(prices, seconds=limit)
        assert plan.seconds <= limit * (1 + 1e-6)
        assert plan.divergence == pytest.approx(divergence[seconds <= limit + 1e-6].min(), abs=1e-12)
    for limit in np.quantile(divergence, np.linspace(0, 1, 30)):
        plan = best_plan(prices, budget=limit)
        assert plan.divergence <= limit * (1 + 1e-6)
        assert plan.seconds == pytest.approx(seconds[divergence <= limit * (1 + 1e-9)].min())


def test_the_frontier_is_best_at_every_price():
    prices = prices_of(7)
    divergence, seconds = every_plan(prices)
    plans = frontier(prices)
    assert plans[0].speed_up == 1 and plans[0].divergence == 0
    assert all(a.speed_up < b.speed_up and a.divergence < b.divergence for a, b in itertools.pairwise(plans))
    for price in np.geomspace(1e-3, 1e3, 40):
        mine = min(plan.divergence + price * plan.seconds for plan in plans)
        assert mine == pytest.approx((divergence + price * seconds).min())


def test_stages_say_what_the_plan_costs():
    """Divergence and seconds of a plan, found again from its stages."""
    prices = prices_of(3, steps=12)
    for plan in frontier(prices):
        stages = stages_of_states(prices, plan.states)
        assert stages[0][1] == 0
        divergence = seconds = 0.0
        for (way, start), end in zip(stages, [*(s for _, s in stages[1:]), 12], strict=True):
            for n, step in enumerate(range(start, end)):
                period = len(way.seconds)
                divergence += prices.divergence[way.rows[int(n >= period), n % period], step].mean()
                seconds += way.seconds[n % period] + 0.25
        assert (divergence, seconds) == (pytest.approx(plan.divergence), pytest.approx(plan.seconds))


def test_a_plan_keeps_away_from_steps_without_a_price():
    prices = prices_of(1, steps=8)
    prices.divergence[1, 3:6] = np.nan  # the shallow network alone
    plan = best_plan(prices, seconds=best_plan(prices, budget=1e9).seconds)
    assert np.isfinite(plan.divergence)
    assert not {s for s, state in enumerate(plan.states) if prices.states.row[state] == 1} & {3, 4, 5}


def test_a_mechanism_alone_is_never_better_than_all():
    prices = prices_of(5, steps=20, intervals=(2, 3, 4))
    for name in ("network", "correct", "hold"):
        alone = prices.only(name)
        for plan in frontier(alone):
            assert best_plan(prices, seconds=plan.seconds).divergence <= plan.divergence + 1e-12


def test_what_cannot_be_reached_is_refused():
    with pytest.raises(InputError, match=r"no plan is as fast as 1 s; the fastest takes 6.25 s, 3.40 times as fast"):
        best_plan(prices_of(0, intervals=()), seconds=1)


def test_errors_of_means_come_from_the_paths():
    prices = prices_of(0)
    divergence = np.random.default_rng(0).exponential(size=(*prices.divergence.shape[:2], 50))
    spread = Prices(prices.timesteps, divergence, prices.ways)
    plan = option_of(spread, spread.states.at_price(spread.states.divergence, spread.states.seconds, 0.1))
    of_paths = divergence[spread.states.row[plan.states], range(STEPS)].sum(axis=0)
    assert plan.divergence == pytest.approx(of_paths.mean())
    assert plan.divergence_se == pytest.approx(of_paths.std(ddof=1) / 50**0.5)


def test_a_thousand_steps_take_seconds_not_minutes():
    """All plans under way at once would be too many; what is left out of sight is what cannot be better."""
    prices = prices_of(2, steps=1000, intervals=(2, 3, 4, 6, 8))
    plan = best_plan(prices, seconds=prices.seconds_full / 3)
    assert plan.speed_up >= 3 * (1 - 1e-9)
    on_hull = [option for option in frontier(prices, most=40) if option.speed_up >= 3]
    assert plan.divergence <= on_hull[0].divergence
