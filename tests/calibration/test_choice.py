"""Which choice is taken, on curves made by hand and against all choices there are."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from calibration.choice import (
    Steps,
    cascades,
    choose,
    chosen_of_other_images,
    evaluated,
    knee,
    least_in_order,
    switches,
)
from common.errors import InputError


def steps_of(divergence, costs, images: int = 4) -> Steps:
    """divergence: (K, S), the same for every image. The full network, last, has none."""
    table = np.array([*divergence, np.zeros(len(divergence[0]))], float)
    table = np.repeat(table[..., None], images, axis=-1)
    return Steps(list(range(table.shape[1] - 1, -1, -1)), np.array(costs, float), table, -table)


def test_a_switch_costs_what_its_steps_do():
    steps = steps_of([[1, 2, 4, 8]], [1, 4])
    options = switches(steps)
    assert [option.t_switch(steps.timesteps) for option in options] == [3, 2, 1, 0, -1]
    assert [option.divergence for option in options] == [0, 1, 3, 7, 15]
    assert [option.excess for option in options] == [0, -1, -3, -7, -15]
    assert [option.speed_up for option in options] == [16 / 16, 16 / 13, 16 / 10, 16 / 7, 16 / 4]


def test_a_shallow_network_stops_where_it_knows_no_more():
    assert len(switches(steps_of([[1, 2, np.nan, 1]], [1, 4]))) == 3
    (alone,) = switches(steps_of([[np.nan, 1, 1, 1]], [1, 4]))
    assert alone.speed_up == 1


def test_targets():
    options = switches(steps_of([[1, 2, 4, 8]], [1, 4]))
    assert choose(options, speed_up=1.0) is options[0]
    assert choose(options, speed_up=1.25) is options[2]
    assert choose(options, budget=3) is options[2]
    assert choose(options, budget=2.9) is options[1]
    assert choose(options, budget=0) is options[0]
    with pytest.raises(InputError, match=r"--speedup 5: the largest speed-up of these networks is 4.00"):
        choose(options, speed_up=5)


def test_the_knee_is_where_time_gets_dear():
    flat_then_steep = [1.0] * 20 + [1.2, 1.4, 1.6, 4, 8, 16, 32, 64, 128]
    options = switches(steps_of([flat_then_steep], [1, 4]))
    assert options.index(knee(options)) == 22  # 1.4 is less than 1.5 times the mean up to it, 1.6 is more
    longer = switches(steps_of([[*flat_then_steep, 1e3, 1e4, 1e5]], [1, 4]))
    assert longer.index(knee(longer)) == 22, "what comes far beyond does not matter"
    scaled = switches(steps_of([[1000 * d for d in flat_then_steep]], [1, 9]))
    assert scaled.index(choose(scaled)) == 22


def test_a_curve_without_a_knee_goes_to_its_end():
    options = switches(steps_of([[1.0] * 10], [1, 4]))
    assert choose(options) is options[-1]
    (alone,) = switches(steps_of([[np.nan, 1, 1, 1]], [1, 4]))
    assert choose([alone]) is alone


def totals(networks, divergence, costs):
    return divergence[networks, np.arange(len(networks))].sum(), costs[networks].sum()


@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize("networks", [2, 3])
def test_cascades_are_the_best_of_all(networks, free):
    """Held against every choice there is: none that costs no more has less divergence."""
    random = np.random.default_rng(1)
    divergence = np.sort(random.exponential(size=(networks - 1, 7)), axis=1) * np.array([[4.0], [1.0]])[: networks - 1]
    steps = steps_of(divergence, [1, 2.5, 4][-networks:])
    means = steps.divergence.mean(axis=-1)
    every = [np.array(order) for order in itertools.product(range(networks), repeat=7)]
    if not free:
        every = [order for order in every if (np.diff(order) >= 0).all()]
    of_all = np.array([totals(order, means, steps.costs) for order in every])
    options = cascades(steps, free)
    assert options[0].speed_up == 1 and options[-1].speed_up == pytest.approx(steps.costs[-1] / steps.costs[0])
    assert len(options) > 3
    for option in options:
        d, c = totals(option.networks, means, steps.costs)
        assert option.divergence == pytest.approx(d)
        assert d <= of_all[of_all[:, 1] <= c + 1e-9, 0].min() + 1e-9
    # No price of a second was passed over.
    for price in np.geomspace(1e-3, 1e3, 50):
        least = (of_all[:, 0] + price * of_all[:, 1]).min()
        mine = min(o.divergence + price * steps.seconds_full / o.speed_up for o in options)
        assert mine == pytest.approx(least)


def test_in_order_or_free():
    divergence = [[1, 9, 1, 9], [0.5, 0.6, 0.5, 0.6]]
    steps = steps_of(divergence, [1, 2, 4])
    orders = {False: set(), True: set()}
    for free, found in orders.items():
        found |= {tuple(option.networks) for option in cascades(steps, free)}
    assert all((np.diff(order) >= 0).all() for order in orders[False])
    assert (0, 1, 0, 1) in orders[True]


def test_networks_stay_where_they_can_run():
    steps = steps_of([[1, 1, np.nan, np.nan], [np.nan, 2, 2, np.nan]], [1, 2, 4])
    for option in cascades(steps, free=True):
        assert np.isfinite(evaluated(steps, option.networks).divergence)
    fastest = cascades(steps, free=False)[-1]
    assert fastest.networks.tolist() == [0, 0, 1, 2]


def test_dynamic_programming_against_all_orders():
    for seed in range(20):
        per_step = np.random.default_rng(seed).normal(size=(4, 6))
        every = [o for o in itertools.product(range(4), repeat=6) if list(o) == sorted(o)]
        best = min(every, key=lambda order: per_step[list(order), range(6)].sum())
        assert least_in_order(per_step).tolist() == list(best)


def test_other_images_choose_close_by_if_there_are_many():
    random = np.random.default_rng(0)
    mean = np.array([1.0] * 20 + list(np.geomspace(1.2, 100, 15)))
    widths = []
    for images in (8, 2000):
        table = np.zeros((2, len(mean), images))
        table[0] = mean[:, None] * random.exponential(size=(len(mean), images))
        steps = Steps(list(range(len(mean) - 1, -1, -1)), np.array([1.0, 4.0]), table, table)
        options = switches(steps)
        places = [options.index(option) for option in chosen_of_other_images(steps, options)]
        widths.append(np.ptp(places))
        assert len(places) == 200
    assert widths[1] < widths[0]
