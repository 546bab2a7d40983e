"""Progress bars: what they say, and where they are silent."""

from __future__ import annotations

import io
import re
import sys

import pytest
import torch

from common.progress import Progress, counted, duration, images_per_second


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def on_terminal(monkeypatch) -> Terminal:
    """Not as a fixture: pytest sets the streams anew between a fixture and its test."""
    monkeypatch.setattr(sys, "stderr", Terminal())
    return sys.stderr


def last_line(terminal: Terminal) -> str:
    return terminal.getvalue().rstrip().rpartition("\r")[2]


def test_a_bar_says_what_is_done_how_far_and_how_fast(monkeypatch):
    terminal = on_terminal(monkeypatch)
    with Progress("training", 1000, "steps", images=8, initial=400) as bar:
        bar.start_t -= 20.0  # as if 100 steps had taken 20 seconds
        bar.update(100)
    said = last_line(terminal)
    assert said.startswith("training:  50%|") and "500 of 1,000 steps [00:2" in said
    rate = float(re.search(r", ([\d.]+) images/s\]$", said)[1])
    assert rate == pytest.approx(100 * 8 / 20, rel=0.1)


def test_parts_of_images_are_counted(monkeypatch):
    terminal = on_terminal(monkeypatch)
    with Progress("sampling", 3) as bar:
        for _ in range(50):
            bar.update(3 / 50)
    assert "sampling: 100%|" in last_line(terminal) and "3 of 3 images" in last_line(terminal)


def test_a_bar_without_images_has_no_rate(monkeypatch):
    terminal = on_terminal(monkeypatch)
    with Progress("measuring", 4, "runs", images=None) as bar:
        bar.update(2)
    assert "2 of 4 runs [" in last_line(terminal) and "images" not in last_line(terminal)


def test_images_of_batches_are_counted(monkeypatch):
    terminal = on_terminal(monkeypatch)
    batches = [torch.zeros(4, 1, 2, 2), torch.ones(3, 1, 2, 2)]
    assert [batch.mean() for batch in counted(batches, "features of samples", 7, quiet=False)] == [0, 1]
    assert "features of samples: 100%|" in last_line(terminal) and "7 of 7 images" in last_line(terminal)


def test_nothing_moves_yet(monkeypatch):
    terminal = on_terminal(monkeypatch)
    Progress("sampling", 0).close()
    Progress("sampling", 5).close()
    assert "0 of 5 images" in last_line(terminal)


def test_no_colours(monkeypatch):
    terminal = on_terminal(monkeypatch)
    with Progress("sampling", 2) as bar:
        bar.update()
    assert "\x1b[3" not in terminal.getvalue()


@pytest.mark.parametrize("quiet, stream", [(True, Terminal), (False, io.StringIO)])
def test_silence(quiet, stream, monkeypatch):
    """With --quiet, and where standard error is no terminal."""
    monkeypatch.setattr(sys, "stderr", stream())
    with Progress("sampling", 2, quiet=quiet) as bar:
        bar.update(2)
    assert sys.stderr.getvalue() == ""


@pytest.mark.parametrize(
    "rate, told",
    [(1310.4, "1,310 images/s"), (10, "10 images/s"), (4.23, "4.2 images/s"), (1, "1.0 images/s"), (0.25, "4 s/image")],
)
def test_rates(rate, told):
    assert images_per_second(rate) == told


@pytest.mark.parametrize(
    "seconds, told",
    [
        (0.83, "0.8 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.6, "1 min 0 s"),
        (200, "3 min 20 s"),
        (3599.7, "1 h 0 min"),
        (18427, "5 h 7 min"),
    ],
)
def test_durations(seconds, told):
    assert duration(seconds) == told
