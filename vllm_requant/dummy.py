"""`--load-format dummy`: weights of the right shape without a checkpoint, for measuring speed."""

from math import gcd

import torch
from requant_kernels.layer import QuantizedLayer
from requant_kernels.packing import packed_length
from requant_kernels.scheme import LayerScheme
from requant_kernels.sparse import SparsePart, column_dtype
from requant_kernels.w8a8.weight import W8A8Weight
from requant_kernels.weight import DenseSparseWeight

DENSITY = 0.005  # of the sparse part: what the presets use
SCALE = 1e-3  # keeps activations finite through any depth


def dummy_layer(scheme: LayerScheme, rows: int, columns: int, dtype: torch.dtype) -> QuantizedLayer:
    """A layer [rows, columns] with random codes, the same in every run."""
    return (_w8a8 if scheme.activations else _dense_sparse)(scheme, rows, columns, dtype)


def _dense_sparse(scheme: LayerScheme, rows: int, columns: int, dtype: torch.dtype) -> DenseSparseWeight:
    weights, generator = scheme.weights, torch.Generator("cpu").manual_seed(0)

    def words(length: int) -> torch.Tensor:
        size = (rows, packed_length(length, weights.bits))
        return torch.randint(-(1 << 31), 1 << 31, size, generator=generator, dtype=torch.int32)

    # A rank may hold part of a group, as DenseSparseWeight.take_columns does.
    group = columns if weights.group_size == -1 else gcd(weights.group_size, columns)
    groups = columns // group

    def filled(width: int) -> torch.Tensor:
        return torch.full((rows, width), SCALE, dtype=dtype)

    return DenseSparseWeight(
        scheme,
        columns,
        group,
        words(columns),
        scale=None if weights.codebook else filled(groups),
        zero_point=None if weights.symmetric else words(groups),
        codebook=filled(weights.levels) if weights.codebook else None,
        sparse=_even_entries(rows, columns, dtype) if scheme.sparse else None,
        bias_correction=torch.zeros(rows, dtype=dtype) if scheme.bias_correction else None,
    )


def _w8a8(scheme: LayerScheme, rows: int, columns: int, dtype: torch.dtype) -> W8A8Weight:
    generator = torch.Generator("cpu").manual_seed(0)
    assert scheme.activations is not None
    static = not scheme.activations.dynamic
    return W8A8Weight(
        scheme,
        torch.randint(-128, 128, (rows, columns), generator=generator, dtype=torch.int8),
        torch.full((rows,), SCALE, dtype=dtype),
        torch.full((1,), SCALE, dtype=dtype) if static else None,
        torch.zeros(1, dtype=torch.int8) if static and not scheme.activations.symmetric else None,
        torch.zeros(rows, dtype=dtype) if scheme.bias_correction else None,
    )


def _even_entries(rows: int, columns: int, dtype: torch.dtype) -> SparsePart:
    per_row = max(1, round(columns * DENSITY))
    row = torch.arange(columns // per_row)  # entries lie evenly, shifted from row to row
    starts = row[torch.arange(rows) % len(row)]
    places = starts[:, None] + torch.arange(per_row) * len(row)
    return SparsePart(
        torch.arange(rows + 1, dtype=torch.int32) * per_row,
        places.flatten().to(column_dtype(columns)),
        torch.full((rows * per_row,), SCALE, dtype=dtype),
        columns,
    )
