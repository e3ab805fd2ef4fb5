"""Entries as patches have them (ours). Those of a symmetric layer, but of 8 bits, are in its steps and less the
midpoint, like a code, so that one multiply-add makes a number of a code and of what is added to it, and steps come
after that, if need be after the product."""

from dataclasses import replace

import torch

from requant_kernels.dense_sparse.triton.strips import unit
from requant_kernels.errors import CheckpointError
from requant_kernels.packing import pack, unpack
from requant_kernels.sparse import SparsePart
from requant_kernels.weight import DenseSparseWeight

# Smaller steps make no weight that a sum would notice; a midpoint of them is nothing beside any entry.
LEAST_STEP = {torch.bfloat16: 2.0**-100, torch.float16: 2.0**-20}


def divisible(weight: DenseSparseWeight) -> DenseSparseWeight:
    """``weight``, symmetric, whose entries can be divided by its steps: those of zero, and of bfloat16 below the
    smallest that is of use, are LEAST_STEP instead, and all codes under them the midpoint."""
    assert weight.scale is not None
    least = LEAST_STEP[weight.dtype]
    bits = weight.scheme.weights.bits
    small = weight.scale.abs() < least if weight.dtype == torch.bfloat16 else weight.scale == 0
    rows = small.any(1).nonzero()[:, 0]
    if not len(rows):
        return weight
    codes = unpack(weight.packed[rows], bits, weight.in_features)
    codes[small[rows].repeat_interleave(weight.group_size, 1)] = 1 << (bits - 1)
    packed = weight.packed.clone()
    packed[rows] = pack(codes, bits)
    return replace(weight, packed=packed, scale=weight.scale.masked_fill(small, least))


def in_steps(weight: DenseSparseWeight) -> SparsePart:
    """The entries of a ``divisible`` weight, each over its step, less the midpoint, times ``unit``.

    Raises CheckpointError where one is so many steps that the weight's dtype has no such number."""
    assert weight.scale is not None
    assert weight.sparse is not None
    sparse, midpoint = weight.sparse, 1 << (weight.scheme.weights.bits - 1)
    steps = weight.scale[sparse.rows(), sparse.columns.long() // weight.group_size].float()
    values = ((sparse.values.float() / steps - midpoint) * unit(weight.dtype)).to(weight.dtype)
    if not bool(values.isfinite().all()):
        most = float((sparse.values.float() / steps).abs().max())
        raise CheckpointError(
            f"sparse_values: {most:g} steps are too many for the kernels in {weight.dtype}: use bfloat16"
        )
    return replace(sparse, values=values)
