"""Times of several tasks that are to be compared."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

import torch
from tqdm import tqdm

from common.devices import Stopwatch

LEAST_SECONDS = 0.2  # of a task's turn


def in_turns(
    tasks: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, quiet: bool = False
) -> dict[str, list[float]]:
    """Seconds of each task, one of each per round: {name: (rounds,)}.

    Tasks take turns because machines are not equally fast all the time: a ratio of two tasks is to be taken
    within each round. A short task is run several times in its turn, for the median. One round is run before and
    not counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    with tqdm(total=(rounds + 1) * len(tasks), unit="run", disable=True if quiet else None) as bar:
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
