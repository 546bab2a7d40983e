"""Warnings of a calibration."""

from __future__ import annotations

import numpy as np
import pytest

from calibration.measure import Predictions
from calibration.run import ask_if_trained


@pytest.mark.parametrize(
    "better, unknown, warned", [(0, 0, False), (5, 0, False), (6, 0, True), (10, 0, True), (6, 4, True), (0, 10, False)]
)
def test_a_full_network_that_predicts_worse_is_noted(better, unknown, warned, caplog):
    """10 steps, of which the shallow network is better at the first `better`, and cannot run at the last `unknown`.

    The network between them, which is always best, has no effect; nor has a single image that differs.
    """
    shallow = np.full((10, 4), 2.0)
    shallow[:better] = [0.9, 0.9, 0.9, 1.1]
    shallow[10 - unknown :] = np.nan
    error = np.stack([shallow, np.full((10, 4), 0.5), np.ones((10, 4))])
    ask_if_trained(Predictions(error, error, dimensions=64))
    assert [record.getMessage() for record in caplog.records] == [
        f"the shallow network predicts better than the full one at {better} of 10 steps: is the full network trained?"
    ] * warned


def test_equal_networks_are_not_noted(caplog):
    ask_if_trained(Predictions(np.ones((2, 10, 4)), np.zeros((2, 10, 4)), dimensions=64))
    assert not caplog.records
