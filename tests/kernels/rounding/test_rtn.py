"""Round to nearest against a naive loop in float64, and the corners of its grid."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from requant_kernels.rounding import rtn
from requant_kernels.scheme import SchemeError, WeightScheme

SCHEMES = [
    pytest.param(WeightScheme(bits, group, symmetric), id=f"w{bits}-g{group}-{'sym' if symmetric else 'asym'}")
    for bits in (2, 3, 4, 8)
    for group in (-1, 32, 64, 128, 256)
    for symmetric in (True, False)
]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def naive(row: torch.Tensor, scheme: WeightScheme, dtype: torch.dtype) -> torch.Tensor:
    """One group, one entry at a time: the level of the rounded grid that is nearest to each entry."""
    low, high, top = min(0.0, float(row.min())), max(0.0, float(row.max())), scheme.levels - 1
    step = 2 * max(-low, high) / top if scheme.symmetric else (high - low) / top
    scale = float(torch.tensor(step).to(dtype))
    zero = scheme.midpoint if scheme.symmetric else min(max(round(-low / scale), 0), top)
    levels = [(code - zero) * scale for code in range(scheme.levels)]
    return torch.tensor([min(levels, key=lambda level: abs(level - float(entry))) for entry in row])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_entry_gets_its_nearest_level(scheme, dtype):
    weight = torch.randn(2, 256, generator=torch.Generator().manual_seed(1))
    decoded = rtn.quantize(weight, scheme, dtype=dtype).dequantize()
    size = 256 if scheme.group_size == -1 else scheme.group_size
    for row, got in zip(weight, decoded, strict=True):
        expected = torch.cat([naive(group, scheme, dtype) for group in row.split(size)])
        # a tie between two levels may go either way
        assert torch.allclose((row - got).abs(), (row - expected).abs(), atol=1e-6)


@given(
    seed=st.integers(0, 999),
    bits=st.sampled_from((2, 3, 4, 8)),
    symmetric=st.booleans(),
    shift=st.sampled_from((0.0, 3.0, -3.0)),
)
def test_no_entry_errs_by_more_than_a_step(seed, bits, symmetric, shift):
    scheme = WeightScheme(bits, 32, symmetric)
    weight = torch.randn(3, 64, generator=torch.Generator().manual_seed(seed)) + shift
    dense = rtn.quantize(weight, scheme, dtype=torch.float32)
    # half a step by rounding, and half a step more where the zero point was rounded
    steps = dense.scale.repeat_interleave(32, 1) * (0.5 if symmetric else 1.0)
    assert bool(((weight - dense.dequantize()).abs() <= steps * 1.0001).all())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_excluded_entries_leave_the_range_alone_and_decode_to_zero(scheme):
    weight = torch.randn(4, 256, generator=torch.Generator().manual_seed(2))
    excluded = torch.zeros_like(weight, dtype=torch.bool)
    excluded[:, ::17] = True
    spiked = weight.masked_fill(excluded, 1e4)
    plain = rtn.quantize(weight.masked_fill(excluded, 0), scheme, dtype=torch.bfloat16)
    dense = rtn.quantize(spiked, scheme, dtype=torch.bfloat16, excluded=excluded)
    assert torch.equal(dense.scale, plain.scale)
    assert torch.equal(dense.codes, plain.codes)
    assert not dense.dequantize()[excluded].any()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-9, 1e-6, 6e4], ids=str)
def test_scales_are_positive_and_finite_whatever_the_size(size, symmetric, dtype):
    weight = size * torch.linspace(-1, 1, 64).repeat(2, 1)
    dense = rtn.quantize(weight, WeightScheme(2, 32, symmetric), dtype=dtype)
    assert bool((dense.scale > 0).all())
    assert bool(torch.isfinite(dense.scale).all())
    # at most one step off: exact zeros stay zeros, and what underflows becomes zero
    assert bool(((dense.dequantize() - weight).abs() <= dense.scale.float().repeat_interleave(32, 1)).all())
    if size == 0:
        assert not dense.dequantize().any()


@pytest.mark.parametrize("sign", [1, -1], ids=["positive", "negative"])
def test_a_range_without_zero_is_widened_to_hold_it(sign):
    weight = sign * (torch.rand(2, 32, generator=torch.Generator().manual_seed(3)) + 5)
    dense = rtn.quantize(weight, WeightScheme(4, 32, symmetric=False), dtype=torch.bfloat16)
    assert bool(((dense.dequantize() - weight).abs() <= dense.scale.float()).all())


def test_a_group_that_does_not_divide_is_refused():
    with pytest.raises(SchemeError, match="group_size 64 does not divide in_features 96"):
        rtn.quantize(torch.zeros(1, 96), WeightScheme(4, 64), dtype=torch.bfloat16)
