"""One step for all inputs of a layer: its range is found on calibration data."""

from dataclasses import dataclass
from typing import Self

import torch
from requant_kernels.rounding.grid import storable_scale

from requant.aweq.settings import RangeMethod

PERCENTILE = 0.9999  # of all values of the tensor, at each end
ROWS = 256  # of x whose float64 copies are made at a time
SHRINKS = torch.logspace(0, -3, 181, dtype=torch.float64)  # of the min-max range that the MSE search tries


@dataclass(frozen=True)
class StaticRange:
    """scale [1] in the model's dtype, zero_point int8 [1] where asymmetric."""

    scale: torch.Tensor
    zero_point: torch.Tensor | None


def static_range(
    x: torch.Tensor,
    method: RangeMethod,
    *,
    symmetric: bool,
    dtype: torch.dtype,
    weights: torch.Tensor | None = None,
) -> StaticRange:
    """x fp32 [T, K] -> the step that ``method`` finds: the whole range, all but the outermost values, or the range with
    the least sum of squared rounding and clipping errors, weighed by ``weights`` (broadcast to [T, K]).

    Raises ValueError where x holds nothing but zeros: no calibration token activates the layer.
    """
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    if low == high:
        raise ValueError("no calibration token activates its input")
    if method == "percentile":
        low, high = _percentiles(x)
    elif method == "mse":
        if symmetric:
            low, high = min(low, -high), max(high, -low)
        shrink = _best_shrink(x, low, high, weights)
        low, high = low * shrink, high * shrink
    return of_bounds(low, high, symmetric=symmetric, dtype=dtype)


def _percentiles(x: torch.Tensor) -> tuple[float, float]:
    flat = x.flatten()
    keep = max(1, round(len(flat) * (1 - PERCENTILE)))
    low, high = (float(flat.kthvalue(k).values) for k in (keep, len(flat) - keep + 1))
    return min(low, 0.0), max(high, 0.0)


def _best_shrink(x: torch.Tensor, low: float, high: float, weights: torch.Tensor | None) -> float:
    steps = (high - low) * SHRINKS / 255
    negative, positive = _Magnitudes.of(x, weights)
    errors = negative.errors(-low * SHRINKS, steps) + positive.errors(high * SHRINKS, steps)
    return float(SHRINKS[errors.argmin()])


@dataclass(frozen=True)
class _Magnitudes:
    """Weighed sums of |x|^0, |x|^1, |x|^2 over the values of one sign, by ascending magnitude: float64 [3, bins + 1],
    on the CPU.

    A bin holds the values with the same first 16 bits, whose magnitudes differ by less than 1 %.
    """

    edges: torch.Tensor
    sums: torch.Tensor

    @classmethod
    def of(cls, x: torch.Tensor, weights: torch.Tensor | None) -> tuple[Self, Self]:
        """(negative, positive)."""
        sums = torch.zeros(3, 1 << 16, dtype=torch.float64, device=x.device)
        whole = x.new_ones(1) if weights is None else weights
        for values, weight in zip(torch.split(x, ROWS), torch.split(whole.expand_as(x), ROWS), strict=True):
            bins = (values.float().contiguous().flatten().view(torch.int32) >> 16) & 0xFFFF
            magnitude, weighed = values.flatten().abs().double(), weight.flatten().double()
            for power in range(3):
                sums[power].index_add_(0, bins, weighed * magnitude**power)
        sums = sums.cpu()
        # the first half of the bins has the sign bit clear; infinities and NaN would follow after 0x7F80
        edges = (torch.arange(1 << 15, dtype=torch.int32) << 16).view(torch.float32).double()[:0x7F80]
        positive, negative = sums.view(3, 2, 1 << 15)[:, :, :0x7F80].unbind(1)
        before = torch.nn.functional.pad
        return cls(edges, before(negative.cumsum(1), (1, 0))), cls(edges, before(positive.cumsum(1), (1, 0)))

    def errors(self, bounds: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        """For each bound and step: values beyond are clipped, those below half a step vanish, and those between err by
        step^2 / 12 on average."""
        near, far = (self.sums[:, torch.searchsorted(self.edges, at)] for at in (steps / 2, bounds))
        far = torch.maximum(near, far)  # a side without a range of its own
        beyond = self.sums[:, -1:] - far
        clipped = beyond[2] - 2 * bounds * beyond[1] + bounds.square() * beyond[0]
        return near[2] + (far[0] - near[0]) * steps.square() / 12 + clipped


def of_bounds(low: float, high: float, *, symmetric: bool, dtype: torch.dtype) -> StaticRange:
    """The step, rounded to ``dtype``, and the zero point that is chosen for the rounded step; zero stays a code."""
    width = max(-low, high) / 127 if symmetric else (high - low) / 255
    scale = storable_scale(torch.tensor([width]), dtype)
    if symmetric:
        return StaticRange(scale, None)
    zero_point = (-128 - torch.tensor([low]) / scale.float()).round().clamp(-128, 127)
    return StaticRange(scale, zero_point.to(torch.int8))
