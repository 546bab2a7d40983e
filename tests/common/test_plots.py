"""Labels that come from the names of folders."""

from __future__ import annotations

import warnings

import numpy as np

from common import plots


def test_networks_are_labelled_to_the_letter(tmp_path, monkeypatch):
    figures = []
    save = plots._save
    monkeypatch.setattr(plots, "_save", lambda figure, path: (figures.append(figure), save(figure, path)))
    few = np.arange(1.0, 4.0)
    curve = plots.Curve(few, "speed-up", few, few, "nats", few, 1, "chosen: 1 + 2", {}, falling=False)
    labels = ["3 blocks ($a_1/$x.pth)", "_13 blocks (漢/b.pth)"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots.plot_calibration(tmp_path / "x.png", curve, [plots.ErrorCurve(label, few, few, few) for label in labels])
    texts = figures[0].axes[-1].get_legend().get_texts()
    assert [text.get_text() for text in texts] == [labels[0], r"_13 blocks (\u6f22/b.pth)"]
    assert not any(text.get_parse_math() for text in texts) and (tmp_path / "x.png").stat().st_size > 1000
