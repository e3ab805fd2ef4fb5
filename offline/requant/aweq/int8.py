"""Rounding to 8 bits with one step for a whole matrix."""

import torch
from requant_kernels.rounding.dense import QuantizedDense
from requant_kernels.rounding.grid import Grid
from requant_kernels.scheme import W8A8_WEIGHTS


def one_step(weight: torch.Tensor, dtype: torch.dtype) -> QuantizedDense:
    """weight fp32 [N, K], rounded to nearest with the same step in every row, as in AWEQ."""
    low, high = (end.expand(len(weight), 1).contiguous() for end in (weight.min(), weight.max()))
    grid = Grid.spanning(low, high, W8A8_WEIGHTS, dtype)
    return grid.dense(grid.codes(weight))
