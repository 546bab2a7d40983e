"""Measure the times of several tasks for comparison."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

import torch

from common.devices import Stopwatch
from common.progress import Progress

LEAST_SECONDS = 0.2  # for each task in each round


def in_turns(
    tasks: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, quiet: bool = False
) -> dict[str, list[float]]:
    """The seconds of each task in each round: {name: (rounds,)}.

    The tasks alternate, because the speed of a machine changes over time: compute ratios within each round. A short
    task runs several times per round, and its median counts. A first warm-up round does not count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    with Progress("measuring", (rounds + 1) * len(tasks), "runs", images=None, quiet=quiet) as bar:
        for number in range(rounds + 1):
            for name, task in tasks.items():
                bar.set_postfix_str(name)
                watch = Stopwatch(device)
                while not watch.laps or (number and watch.seconds < LEAST_SECONDS):
                    with watch:
                        task()
                if number:
                    seconds[name].append(statistics.median(watch.laps))
                bar.update()
    return seconds


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """The median over the rounds of above / below."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))
