"""Seeds for things that must not depend on anything else."""

from __future__ import annotations

import numpy as np

STREAMS = ("samples", "training steps", "calibration")


def nth_seed(seed: int, stream: str, index: int) -> int:
    """The seed of item `index` of a stream, in 0..2^32 - 1; the user's seed starts the stream.

    torch's CPU generator uses 32 bits of a seed. Counting up from a hashed start gives every item of a
    run its own, where hashing each index would make two of 100,000 samples alike about once a run.
    """
    start = int(np.random.SeedSequence([seed, STREAMS.index(stream)]).generate_state(1)[0])
    return (start + index) % 2**32
