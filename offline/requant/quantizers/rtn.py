"""Round to nearest: the code whose level is closest, group by group, without data. Ours; the field's baseline."""

import torch
from requant_kernels.scheme import WeightScheme

from requant.quantizers.dense import QuantizedDense


def quantize(
    weight: torch.Tensor, scheme: WeightScheme, *, dtype: torch.dtype, excluded: torch.Tensor | None = None
) -> QuantizedDense:
    """weight fp32 [N, K], finite -> codes and steps; scales are rounded to ``dtype`` before codes are chosen.

    Entries under ``excluded`` (bool [N, K]) do not widen a group's range and get the code of zero (Algorithm 1 of
    the PQI paper, as reconstructed). A symmetric step is absmax / (levels/2 - 1/2), so that neither end errs by more
    than half a step; an asymmetric range always holds zero, because the zero point is itself a code.
    Raises SchemeError where the group size does not divide K.
    """
    rows, columns = weight.shape
    groups = scheme.groups(columns)
    # Zero is in every range and on every grid: filling with it is all that exclusion takes.
    kept = weight if excluded is None else weight.masked_fill(excluded, 0)
    kept = kept.reshape(rows, groups, columns // groups)
    low, high = kept.amin(-1).clamp(max=0), kept.amax(-1).clamp(min=0)
    top = scheme.levels - 1
    if scheme.symmetric:
        scale = storable_scale(torch.maximum(high, -low) * (2 / top), dtype)
        zero = torch.full_like(low, scheme.midpoint)
    else:
        # two divisions, because high - low may overflow
        scale = storable_scale(high / top - low / top, dtype)
        zero = torch.round(-low / scale.float()).clamp(0, top)
    codes = torch.round(kept / scale.float()[..., None]) + zero[..., None]
    return QuantizedDense(
        scheme,
        codes.clamp(0, top).to(torch.uint8).reshape(rows, columns),
        scale=scale,
        zero_points=None if scheme.symmetric else zero.to(torch.uint8),
    )


def storable_scale(step: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``step`` fp32 >= 0 rounded to ``dtype``, always positive: 1 where the group is all zero, and never rounded to
    zero. Normal numbers only, except in fp16, whose normal range ends at 6e-5, within reach of real weights."""
    smallest = 2.0**-24 if dtype == torch.float16 else torch.finfo(dtype).tiny
    return torch.where(step == 0, torch.ones_like(step), step).clamp(min=smallest).to(dtype)
