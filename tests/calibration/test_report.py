"""Labels that come from the names of folders."""

from __future__ import annotations

import warnings

import numpy as np
from matplotlib.figure import Figure

from calibration.report import draw_errors
from common import plots


def test_networks_are_labelled_to_the_letter(tmp_path):
    figure = Figure()
    labels = ["3 blocks ($a_1/$x.pth)", "_13 blocks (漢/b.pth)"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_errors(figure.subplots(), labels, np.arange(3), np.arange(1.0, 13.0).reshape(2, 3, 2))
        plots.save(figure, tmp_path / "x.png")
    texts = figure.axes[0].get_legend().get_texts()
    assert [text.get_text() for text in texts] == [labels[0], r"_13 blocks (\u6f22/b.pth)"]
    assert not any(text.get_parse_math() for text in texts) and (tmp_path / "x.png").stat().st_size > 1000


def test_errors_are_drawn_from_the_first_timestep_to_the_last():
    axes = Figure().subplots()
    draw_errors(axes, ["a", "b"], np.array([999, 500, 49]), np.arange(1.0, 13.0).reshape(2, 3, 2))
    assert axes.get_xlim() == (999, 49)
