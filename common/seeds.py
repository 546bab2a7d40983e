"""Independent seeds for samples, training steps and calibration images."""

from __future__ import annotations

import numpy as np

STREAMS = ("samples", "training steps", "calibration", "checking a plan")


def nth_seed(seed: int, stream: str, index: int) -> int:
    """The seed of item `index` of a stream, in 0..2^32 - 1. The user's seed decides the start of the stream.

    torch's CPU generator uses 32 bits of a seed. Counting up from a hashed start gives each item of a run a different
    seed. Hashing each index would give two of 100,000 samples the same seed about once per run.
    """
    start = int(np.random.SeedSequence([seed, STREAMS.index(stream)]).generate_state(1)[0])
    return (start + index) % 2**32
