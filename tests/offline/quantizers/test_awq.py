import pytest
import torch
from requant.quantizers import awq
from requant.statistics import InputStatistics
from requant_kernels.rounding.rtn import quantize as round_to_nearest
from requant_kernels.scheme import WeightScheme

SCHEME = WeightScheme(3, 32, False)


def statistics_of(x: torch.Tensor) -> InputStatistics:
    statistics = InputStatistics.empty(x.shape[1], x.device)
    statistics.add(x)
    return statistics


def inputs() -> torch.Tensor:
    x = torch.randn(300, 64)
    x[:, [3, 40]] *= 30
    return x


def test_output_error_is_the_mean_squared_output() -> None:
    x, difference = inputs(), torch.randn(5, 64)
    expected = (difference @ x.T).square().sum(0).mean()
    assert awq.output_error(difference, statistics_of(x).second_moment) == pytest.approx(float(expected), rel=1e-4)


def test_the_scale_is_the_best_of_the_grid_for_all_consumers() -> None:
    x, weights = inputs(), [torch.randn(8, 64), torch.randn(4, 64)]
    statistics = statistics_of(x)
    found = awq.search_scale(weights, statistics, SCHEME, dtype=torch.bfloat16)

    def error(scale: torch.Tensor) -> float:
        rounded = [round_to_nearest(w * scale, SCHEME, dtype=torch.bfloat16).dequantize() / scale for w in weights]
        return sum(float(((r - w) @ x.T).square().sum()) for r, w in zip(rounded, weights, strict=True))

    magnitude = x.abs().mean(0)
    candidates = [magnitude**alpha for alpha in awq.ALPHAS]
    errors = [error(c / (c.max() * c.min()).sqrt()) for c in candidates]
    assert error(found) == pytest.approx(min(errors), rel=1e-4)
    assert min(errors) < 0.5 * errors[0]


def test_excluded_entries_have_no_say() -> None:
    x, weight = inputs(), torch.randn(8, 64)
    excluded = torch.rand(8, 64) < 0.1
    spiked = torch.where(excluded, torch.full_like(weight, 50.0), weight)
    scales = [
        awq.search_scale([w], statistics_of(x), SCHEME, dtype=torch.bfloat16, excluded=[excluded])
        for w in (weight, spiked)
    ]
    assert torch.equal(*scales)


def test_a_channel_that_calibration_does_not_activate_keeps_its_weights() -> None:
    x, weight = inputs(), torch.randn(8, 64)
    x[:, 7] = 0
    scale = awq.search_scale([weight], statistics_of(x), SCHEME, dtype=torch.bfloat16)
    assert not torch.equal(scale, torch.ones(64))
    assert float(scale[7]) == pytest.approx(1)
    rounded = round_to_nearest(weight * scale, SCHEME, dtype=torch.bfloat16).dequantize() / scale
    assert float((rounded - weight)[:, 7].norm()) < 0.5 * float(weight[:, 7].norm())


def test_a_layer_that_is_never_activated_is_not_scaled() -> None:
    scale = awq.search_scale([torch.randn(8, 64)], statistics_of(torch.zeros(9, 64)), SCHEME, dtype=torch.bfloat16)
    assert torch.equal(scale, torch.ones(64))


def test_clipping_lowers_the_weighted_error() -> None:
    x, weight = inputs(), torch.randn(8, 64) ** 3
    statistics = statistics_of(x)
    clipped = awq.quantize(weight, statistics, SCHEME, dtype=torch.bfloat16).dequantize()
    rounded = round_to_nearest(weight, SCHEME, dtype=torch.bfloat16).dequantize()
    diagonal = statistics.second_moment.diagonal()
    assert float(((clipped - weight) ** 2 * diagonal).sum()) < float(((rounded - weight) ** 2 * diagonal).sum())
