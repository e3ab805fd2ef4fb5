"""Clip search: the group ranges that round best, among a fixed list of shrunken ones (the field's MSE observer)."""

import torch
from requant_kernels.rounding.dense import QuantizedDense
from requant_kernels.rounding.grid import Grid
from requant_kernels.scheme import WeightScheme

SHRINK = tuple(1 - step / 32 for step in range(20))  # down to 0.41 of the full range


def search(
    weight: torch.Tensor,
    scheme: WeightScheme,
    *,
    dtype: torch.dtype,
    importance: torch.Tensor | None = None,
    excluded: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(low, high), fp32 [N, G]: the range whose uniform grid (Grid.spanning, scale in ``dtype``) minimises
    sum_k importance_k (w_k - w~_k)^2 in each group, among the full range shrunk by each of SHRINK.

    weight fp32 [N, K]; importance fp32 [K] or [N, K], default 1; entries under ``excluded`` (bool [N, K]) neither widen
    a range nor count. Raises SchemeError where the group size does not divide K.
    """
    rows, groups = len(weight), scheme.groups(weight.shape[1])
    kept = weight if excluded is None else weight.masked_fill(excluded, 0)
    grouped = kept.reshape(rows, groups, -1)
    low, high = grouped.amin(-1), grouped.amax(-1)
    best = torch.ones_like(low)
    least = torch.full_like(low, float("inf"))
    for shrink in SHRINK:
        grid = Grid.spanning(shrink * low, shrink * high, scheme, dtype)
        # an excluded slot holds zero, which every grid represents exactly: it adds no error
        error = (grid.nearest(kept) - kept).square()
        if importance is not None:
            error = error * importance
        total = error.reshape(rows, groups, -1).sum(-1)
        best = torch.where(total < least, shrink, best)
        least = torch.minimum(total, least)
    return best * low, best * high


def quantize(
    weight: torch.Tensor,
    scheme: WeightScheme,
    *,
    dtype: torch.dtype,
    importance: torch.Tensor | None = None,
    excluded: torch.Tensor | None = None,
) -> QuantizedDense:
    """weight fp32 [N, K] rounded to nearest on its searched ranges; entries under ``excluded`` get the code of zero."""
    low, high = search(weight, scheme, dtype=dtype, importance=importance, excluded=excluded)
    grid = Grid.spanning(low, high, scheme, dtype)
    return grid.dense(grid.codes(weight if excluded is None else weight.masked_fill(excluded, 0)))
