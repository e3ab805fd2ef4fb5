"""Rounded weights of 8 bits -> W8A8 layers."""

import torch
from requant_kernels.scheme import W8A8_WEIGHTS, LayerScheme
from requant_kernels.w8a8.weight import W8A8Weight

from requant.quantizers.dense import QuantizedDense
from requant.quantizers.grid import Grid


def from_dense(dense: QuantizedDense, scheme: LayerScheme) -> W8A8Weight:
    """A layer without a bias correction, whose input step, if ``scheme`` has static ones, is still to be found. dense:
    one step a row."""
    assert dense.scheme == W8A8_WEIGHTS
    assert dense.scale is not None
    codes = (dense.codes.to(torch.int16) - W8A8_WEIGHTS.midpoint).to(torch.int8)
    return W8A8Weight(LayerScheme(W8A8_WEIGHTS, activations=scheme.activations), codes, dense.scale.flatten())


def one_step(weight: torch.Tensor, dtype: torch.dtype) -> QuantizedDense:
    """weight fp32 [N, K], rounded to nearest with the same step in every row, as in AWEQ."""
    low, high = (end.expand(len(weight), 1).contiguous() for end in (weight.min(), weight.max()))
    grid = Grid.spanning(low, high, W8A8_WEIGHTS, dtype)
    return grid.dense(grid.codes(weight))
