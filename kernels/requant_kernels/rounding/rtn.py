"""Round to nearest: the code whose level is closest, group by group, without data. Ours; the field's baseline."""

import torch

from requant_kernels.rounding.dense import QuantizedDense
from requant_kernels.rounding.grid import Grid
from requant_kernels.scheme import WeightScheme


def quantize(
    weight: torch.Tensor, scheme: WeightScheme, *, dtype: torch.dtype, excluded: torch.Tensor | None = None
) -> QuantizedDense:
    """weight fp32 [N, K], finite -> codes and steps; scales are rounded to ``dtype`` before codes are chosen.

    Entries under ``excluded`` (bool [N, K]) do not widen a group's range and get the code of zero (Algorithm 1 of
    the PQI paper, as reconstructed). Raises SchemeError where the group size does not divide K.
    """
    # Zero is in every range and on every grid: filling with it is all that exclusion takes.
    kept = weight if excluded is None else weight.masked_fill(excluded, 0)
    grouped = kept.reshape(len(weight), scheme.groups(weight.shape[1]), -1)
    grid = Grid.spanning(grouped.amin(-1), grouped.amax(-1), scheme, dtype)
    return grid.dense(grid.codes(kept))
