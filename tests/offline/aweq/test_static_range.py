import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from requant.aweq.static_range import ROWS, _Magnitudes, static_range
from requant_kernels.reference import quantize_input
from requant_kernels.scheme import ActivationScheme

METHODS = ("minmax", "percentile", "mse")


def noise(seed=0, outliers=()):
    x = torch.randn(200, 100, generator=torch.Generator().manual_seed(seed))
    x[0, : len(outliers)] = torch.tensor(outliers, dtype=torch.float32)
    return x


def error(x, static, symmetric):
    scheme = ActivationScheme(dynamic=False, symmetric=symmetric)
    rounded = quantize_input(x, scheme, static.scale, static.zero_point).dequantize()
    return float((rounded - x).square().mean())


@given(seed=st.integers(0, 99), shift=st.sampled_from((-2.0, 0.0, 2.0)), symmetric=st.booleans())
def test_minmax_clips_nothing(seed, shift, symmetric):
    x = noise(seed) + shift
    static = static_range(x, "minmax", symmetric=symmetric, dtype=torch.float32)
    scheme = ActivationScheme(dynamic=False, symmetric=symmetric)
    rounded = quantize_input(x, scheme, static.scale, static.zero_point).dequantize()
    assert bool(((rounded - x).abs() <= static.scale * 0.51).all())


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_percentile_leaves_out_the_outermost_values(symmetric):
    x = noise(outliers=(1000.0, -1000.0))
    static = static_range(x, "percentile", symmetric=symmetric, dtype=torch.float32)
    assert float(static.scale) < 10 / 127


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("outliers", [(), (30.0,), (500.0, -20.0)], ids=["none", "one", "two"])
def test_mse_is_the_best_of_all(symmetric, outliers):
    x = noise(outliers=outliers)
    errors = {
        method: error(x, static_range(x, method, symmetric=symmetric, dtype=torch.float32), symmetric)
        for method in METHODS
    }
    assert errors["mse"] <= min(errors.values()) * 1.05  # the search is on a grid


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_mse_is_the_best_of_a_naive_search_with_weights(symmetric):
    x, generator = noise(outliers=(60.0, -20.0)), torch.Generator().manual_seed(1)
    weights = torch.outer(torch.rand(200, generator=generator), torch.rand(100, generator=generator))
    weights[0] = 1e-6  # the outliers hardly matter
    scheme = ActivationScheme(dynamic=False, symmetric=symmetric)

    def weighed(static):
        rounded = quantize_input(x, scheme, static.scale, static.zero_point).dequantize()
        return float((weights * (rounded - x).square()).sum())

    found = weighed(static_range(x, "mse", symmetric=symmetric, dtype=torch.float32, weights=weights))
    naive = [
        weighed(static_range(x.clamp(-end, end * 3), "minmax", symmetric=symmetric, dtype=torch.float32))
        for end in torch.linspace(0.5, 20, 60).tolist()
    ]
    assert found <= min(naive) * 1.05


@pytest.mark.parametrize("weighed", [True, False], ids=["weighed", "not weighed"])
def test_rows_are_summed_in_any_pieces_to_the_same_bits(weighed, monkeypatch):
    generator = torch.Generator().manual_seed(1)
    x = noise() * 10 ** torch.randn(200, 1, generator=generator)
    weights = torch.outer(torch.rand(200, generator=generator), torch.rand(100, generator=generator))
    found = []
    for rows in (1, 7, 200, 10**6):
        monkeypatch.setattr("requant.aweq.static_range.ROWS", rows)
        found.append(_Magnitudes.of(x, weights if weighed else None))
    bins, weight = (x.flatten().view(torch.int32) >> 16) & 0xFFFF, weights if weighed else torch.ones_like(x)
    values = weight.flatten().double() * x.flatten().abs().double() ** 2
    at_once = torch.bincount(bins, values, minlength=1 << 16)[1 << 15 :][:0x7F80].cumsum(0)
    for negative, positive in found:
        assert torch.equal(negative.sums, found[0][0].sums)
        assert torch.equal(positive.sums, found[0][1].sums)
        assert torch.equal(negative.sums[2, 1:], at_once)


def test_the_search_makes_no_copy_of_all_inputs(monkeypatch):
    """In float64 there were nine."""
    made = []
    double = torch.Tensor.double
    monkeypatch.setattr(torch.Tensor, "double", lambda one: made.append(one.numel()) or double(one))
    static_range(torch.randn(4 * ROWS, 512), "mse", symmetric=True, dtype=torch.float32)
    assert max(made) <= ROWS * 512


def test_an_asymmetric_range_spends_no_code_on_values_that_do_not_occur():
    x = noise().abs()
    steps = {way: static_range(x, "minmax", symmetric=way, dtype=torch.float32) for way in (True, False)}
    assert float(steps[False].scale) == pytest.approx(float(steps[True].scale) * 127 / 255)
    assert steps[False].zero_point.tolist() == [-128]


def test_the_step_is_rounded_to_the_models_dtype_before_the_zero_point_is_chosen():
    static = static_range(noise() + 1, "minmax", symmetric=False, dtype=torch.bfloat16)
    assert static.scale.dtype == torch.bfloat16
    assert static.zero_point.dtype == torch.int8


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("size", [1e-2, 1e-3, 1e-4])
def test_small_inputs_of_a_float16_model_are_not_rounded_away(size, symmetric):
    x = noise() * size
    found = {
        dtype: error(x, static_range(x, "minmax", symmetric=symmetric, dtype=dtype), symmetric)
        for dtype in (torch.float16, torch.float32)
    }
    assert found[torch.float16] < 1.2 * found[torch.float32]


@pytest.mark.parametrize("method", METHODS)
def test_an_input_that_is_never_activated_has_no_range(method):
    with pytest.raises(ValueError, match="no calibration token activates its input"):
        static_range(torch.zeros(4, 4), method, symmetric=True, dtype=torch.float32)
