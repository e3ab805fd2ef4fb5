"""The definition of W8A8, against integers and against what rounding to int8 must guarantee."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from requant_kernels.reference import dequantize, quantize_input, w8a8_linear
from requant_kernels.scheme import ActivationScheme

from tests.kernels.strategies import random_w8a8, w8a8_layers

DYNAMIC = ActivationScheme(dynamic=True)
DYNAMIC_ASYMMETRIC = ActivationScheme(dynamic=True, symmetric=False)
STATIC = ActivationScheme(dynamic=False)
STATIC_ASYMMETRIC = ActivationScheme(dynamic=False, symmetric=False)


def naive(x, weight, bias):
    """docs/FORMAT.md token by token and row by row: exact integers, then float64."""
    steps = quantize_input(x, weight.scheme.activations, weight.input_scale, weight.input_zero_point)
    out = torch.empty(x.shape[0], weight.out_features, dtype=torch.float64)
    for m, codes in enumerate(steps.codes.tolist()):
        zero, scale = int(steps.zero_point[m]), float(steps.scale[m])
        for n, row in enumerate(weight.codes.tolist()):
            total = sum((q - zero) * w for q, w in zip(codes, row, strict=True))
            out[m, n] = total * scale * float(weight.scale[n])
    for vector in (bias, weight.bias_correction):
        if vector is not None:
            out += vector.double()
    return out


@given(weight=w8a8_layers(), tokens=st.integers(1, 5), with_bias=st.booleans())
def test_the_product_equals_the_definition(weight, tokens, with_bias):
    x = torch.randn(tokens, weight.in_features)
    bias = torch.randn(weight.out_features) if with_bias else None
    torch.testing.assert_close(w8a8_linear(x, weight, bias).double(), naive(x, weight, bias), rtol=2e-6, atol=1e-5)


@given(seed=st.integers(0, 999), columns=st.integers(1, 80), symmetric=st.booleans(), shift=st.sampled_from((-9, 0, 9)))
def test_dynamic_rounding_errs_by_half_a_step_and_never_clips(seed, columns, symmetric, shift):
    x = torch.randn(4, columns, generator=torch.Generator().manual_seed(seed)) * 3 + shift
    steps = quantize_input(x, ActivationScheme(dynamic=True, symmetric=symmetric))
    assert bool(((steps.dequantize() - x).abs() <= steps.scale * 0.501).all())
    assert int(steps.zero_point.min()) >= -128
    assert int(steps.zero_point.max()) <= 127


@pytest.mark.parametrize("scheme", [DYNAMIC, DYNAMIC_ASYMMETRIC], ids=["symmetric", "asymmetric"])
def test_a_token_of_zeros_stays_zero(scheme):
    assert torch.equal(quantize_input(torch.zeros(2, 8), scheme).dequantize(), torch.zeros(2, 8))


def test_symmetric_codes_of_a_known_row():
    steps = quantize_input(torch.tensor([[0.0, 1.0, -127.0, 0.5, 1.5, 63.4]]), DYNAMIC)
    assert steps.codes.tolist() == [[0, 1, -127, 0, 2, 63]]  # halves go to the even neighbour
    assert steps.scale.item() == 1


def test_asymmetric_codes_of_a_known_row():
    steps = quantize_input(torch.tensor([[-1.0, 0.0, 254.0]]), DYNAMIC_ASYMMETRIC)
    assert steps.codes.tolist() == [[-128, -127, 127]]
    assert (steps.scale.item(), steps.zero_point.item()) == (1, -127)


def test_static_steps_clip_what_lies_outside():
    x = torch.tensor([[-200.0, -1.0, 0.0, 1.0, 200.0]])
    scale, zero_point = torch.tensor([1.0]), torch.tensor([-100], dtype=torch.int8)
    assert quantize_input(x, STATIC, scale).codes.tolist() == [[-128, -1, 0, 1, 127]]
    assert quantize_input(x, STATIC_ASYMMETRIC, scale, zero_point).codes.tolist() == [[-128, -101, -100, -99, 100]]


@pytest.mark.parametrize("scheme", [DYNAMIC, DYNAMIC_ASYMMETRIC], ids=["symmetric", "asymmetric"])
def test_the_product_is_near_the_unrounded_one(scheme):
    weight, x = random_w8a8(scheme, (32, 256), dtype=torch.float32), torch.randn(16, 256)
    exact = x @ dequantize(weight).T
    assert float((w8a8_linear(x, weight) - exact).norm() / exact.norm()) < 0.02


def test_leading_dimensions_and_the_dtype_of_x_are_kept():
    weight = random_w8a8(DYNAMIC, (8, 64))
    y = w8a8_linear(torch.randn(2, 3, 64, dtype=torch.bfloat16), weight)
    assert (y.shape, y.dtype) == ((2, 3, 8), torch.bfloat16)
