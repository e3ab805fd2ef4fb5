"""Resident memory over time, and whether it grows once the server has warmed up."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

WARM_UP = 0.3  # of the time: pools, caches and heaps fill
WINDOW = 0.2  # of the time after it: what is compared, at its beginning and end


@dataclass(frozen=True)
class Sample:
    seconds: float
    resident_bytes: int


def growth_bytes(samples: Sequence[Sample]) -> float:
    """From the median of the first window after warm-up to that of the last. ``samples`` at equal distances."""
    warm = samples[int(len(samples) * WARM_UP) :]
    count = max(1, int(len(warm) * WINDOW))
    first, last = ([sample.resident_bytes for sample in part] for part in (warm[:count], warm[-count:]))
    return statistics.median(last) - statistics.median(first)
