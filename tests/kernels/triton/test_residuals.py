"""Entries of symmetric layers in steps: what kernels make of them is what the file says."""

from dataclasses import replace

import pytest
import torch
from requant_kernels import reference
from requant_kernels.dense_sparse.triton.layer import build
from requant_kernels.dense_sparse.triton.residuals import LEAST_STEP, divisible, in_steps
from requant_kernels.dense_sparse.triton.strips import unit
from requant_kernels.errors import CheckpointError
from requant_kernels.scheme import LayerScheme, SparseScheme, WeightScheme
from requant_kernels.weight import DenseSparseWeight

from tests.kernels.strategies import random_weight

SHAPE = (48, 320)


def layer(bits: int = 4, group: int = 64, dtype: torch.dtype = torch.bfloat16) -> DenseSparseWeight:
    scheme = LayerScheme(WeightScheme(bits, group), SparseScheme())
    return random_weight(scheme, SHAPE, density=0.1, dtype=dtype)


def without_some_steps(weight: DenseSparseWeight) -> DenseSparseWeight:
    """Whole rows and single groups step by zero, others by next to nothing."""
    assert weight.scale is not None
    scale = weight.scale.clone()
    scale[3] = 0
    scale[7:20, 1] = 0
    if scale.dtype == torch.bfloat16:
        scale[21:30, 0] = LEAST_STEP[scale.dtype] / 2
    return replace(weight, scale=scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_code_and_an_entry_are_a_number_of_steps(bits, dtype):
    """As decode.py adds them up: codes times ``unit``, plus what stands at the place, rounded, times steps."""
    weight = layer(bits, dtype=dtype)
    sparse = in_steps(weight)
    rows, columns = sparse.rows(), sparse.columns.long()
    codes = weight.codes()[rows, columns].float()
    numbers = (codes * unit(dtype) + sparse.values.float()).to(dtype).double() / unit(dtype)
    steps = weight.scale.double().repeat_interleave(64, 1)[rows, columns]
    dense = (codes.double() - (1 << (bits - 1))) * steps
    entries = weight.sparse.values.double()
    off = (numbers * steps - (dense + entries)).abs()
    assert (off <= 0.5 * torch.finfo(dtype).eps * (entries.abs() + 2**bits * steps + (dense + entries).abs())).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_steps_of_zero_become_some_that_nothing_is_a_multiple_of(dtype):
    weight = without_some_steps(layer(dtype=dtype))
    found, least = divisible(weight), LEAST_STEP[dtype]
    assert torch.equal(found.scale == least, weight.scale.float().abs() < (least if dtype == torch.bfloat16 else 1e-9))
    assert (reference.dequantize_dense(found) - reference.dequantize_dense(weight)).abs().max() < 2**-90
    sparse, entries = in_steps(found), weight.sparse.values.double()
    steps = found.scale.double().repeat_interleave(64, 1)[sparse.rows(), sparse.columns.long()]
    off = ((sparse.values.double() / unit(dtype) + 8) * steps - entries).abs()[steps == least]
    assert len(off)
    assert (off <= torch.finfo(dtype).eps * entries.abs()[steps == least] + 16 * least).all()
    whole = layer()
    assert divisible(whole) is whole


def test_entries_of_too_many_steps_are_refused():
    weight = layer(dtype=torch.float16)
    weight.sparse.values.fill_(60_000)
    weight = replace(weight, scale=torch.full_like(weight.scale, 2**-20))
    with pytest.raises(CheckpointError, match=r"sparse_values: 6.29146e\+10 steps are too many .*: use bfloat16"):
        build(weight)
