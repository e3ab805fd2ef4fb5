"""The k largest scores over many matrices without holding, or sorting, more than one matrix at a time."""

from collections.abc import Callable, Iterable, Sequence

import torch

Scores = Callable[[], Iterable[tuple[str, torch.Tensor]]]

_HALF = 1 << 16


def _ordered(scores: torch.Tensor) -> torch.Tensor:
    """fp32 -> int64 in [0, 2^32) in the same order (the bit pattern of a float orders like its value, sign apart)."""
    bits = (scores.float().flatten() + 0.0).view(torch.int32).long()  # + 0.0 makes -0.0 equal to 0.0
    return torch.where(bits < 0, -bits - 1, bits + (1 << 31))


def top_k(scores: Scores, k: int) -> dict[str, torch.Tensor]:
    """Flat indices (int64, ascending) of the ``k`` largest scores over all matrices, by name; NaN is refused.

    ``scores`` yields (name, scores of any shape) and is walked three times, in the same order: high halves of the bit
    patterns are counted, then the low halves of those that tie with the k-th, then entries are taken. Memory: two
    histograms of 65,536 counts and one matrix. Ties go to the earlier entry. Raises ValueError where there are fewer
    than ``k`` entries or a score is NaN.
    """
    if k == 0:
        return {name: torch.empty(0, dtype=torch.int64) for name, _ in scores()}
    high, above = _kth_bin(_high_counts(scores), k)
    low, above_low = _kth_bin(_low_counts(scores, high), k - above)
    threshold, ties = high * _HALF + low, k - above - above_low
    chosen = {}
    for name, values in scores():
        keys = _ordered(values)
        equal = (keys == threshold).nonzero().flatten()[:ties]
        ties -= len(equal)
        chosen[name] = torch.cat([(keys > threshold).nonzero().flatten(), equal]).sort().values
    return chosen


def mask_of(index: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """bool of ``shape``, set at the flat indices int64 [k]."""
    mask = torch.zeros(tuple(shape), dtype=torch.bool, device=index.device)
    mask.view(-1)[index] = True
    return mask


def _high_counts(scores: Scores) -> torch.Tensor:
    counts = torch.zeros(_HALF, dtype=torch.int64)
    for name, values in scores():
        if bool(values.isnan().any()):
            raise ValueError(f"{name}: a sensitivity score is not a number")
        counts += torch.bincount(_ordered(values) // _HALF, minlength=_HALF)
    return counts


def _low_counts(scores: Scores, high: int) -> torch.Tensor:
    counts = torch.zeros(_HALF, dtype=torch.int64)
    for _, values in scores():
        keys = _ordered(values)
        counts += torch.bincount(keys[keys // _HALF == high] % _HALF, minlength=_HALF)
    return counts


def _kth_bin(counts: torch.Tensor, k: int) -> tuple[int, int]:
    """The bin that holds the k-th largest, and how many lie in the bins above it."""
    at_least = counts.flip(0).cumsum(0)
    if int(at_least[-1]) < k:
        raise ValueError(f"{k} entries were asked for, but there are only {int(at_least[-1])}")
    position = int((at_least >= k).nonzero()[0])
    return len(counts) - 1 - position, int(at_least[position] - counts.flip(0)[position])
