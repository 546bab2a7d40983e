"""The picture of exit layers."""

from __future__ import annotations

import numpy as np

from common import plots
from generation.exits import draw_exit_layers


def test_its_axes_end_where_the_data_ends(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure))
    timesteps, layers = np.array([999, 500, 49]), np.array([[1, 2], [5, 7], [7, 7]])
    draw_exit_layers(tmp_path / "x.png", timesteps, layers, depth=7, threshold=0.1)
    (axes,) = figures[0].axes
    assert axes.get_xlim() == (999, 49) and axes.get_ylim() == (0, 7)
    assert axes.get_legend() is None and len(figures[0].legends) == 1, "the legend covers no data"
    assert axes.lines[0].get_ydata().tolist() == [1.5, 6, 7]
