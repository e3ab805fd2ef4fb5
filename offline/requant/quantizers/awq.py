"""AWQ: input channels that carry large activations are scaled up before rounding, and down again where x comes from.

Source: Lin et al., arXiv 2306.00978: s = E[|x|]^alpha with alpha searched on a grid, Eq. 4-5. The error that the search
minimises is that of the layers' outputs, computed exactly from the second moment of the inputs.
"""

from collections.abc import Sequence

import torch
from requant_kernels.rounding.dense import QuantizedDense
from requant_kernels.rounding.rtn import quantize as round_to_nearest
from requant_kernels.scheme import WeightScheme

from requant.quantizers import clip
from requant.statistics import InputStatistics

ALPHAS = tuple(step / 20 for step in range(20))


def search_scale(
    weights: Sequence[torch.Tensor],
    statistics: InputStatistics,
    scheme: WeightScheme,
    *,
    dtype: torch.dtype,
    excluded: Sequence[torch.Tensor | None] | None = None,
) -> torch.Tensor:
    """Scale fp32 [K], positive, for ``weights`` (fp32 [N_i, K]) that read one input: least sum of output errors.

    Entries under ``excluded`` (bool [N_i, K] each) have no error. alpha = 0, no scaling, is among the candidates. A
    channel that no calibration token activates keeps 1: scaled down, its weights would all round to zero.
    """
    masks = [None] * len(weights) if excluded is None else excluded
    moment, magnitude = statistics.second_moment, statistics.mean_absolute
    silent, most = magnitude == 0, magnitude.max()
    middle = (most * magnitude.masked_fill(silent, most).min()).sqrt()  # whose scale is 1, whatever alpha
    magnitude = torch.where(silent, middle, magnitude).clamp(min=1e-8)
    best, least = torch.ones_like(magnitude), float("inf")
    for alpha in ALPHAS:
        scale = magnitude**alpha
        scale = scale / (scale.max() * scale.min()).sqrt()
        error = 0.0
        for weight, mask in zip(weights, masks, strict=True):
            rounded = round_to_nearest(weight * scale, scheme, dtype=dtype, excluded=mask).dequantize() / scale
            error += output_error(rounded - weight, moment, mask)
        if error < least:
            best, least = scale, error
    return best


def output_error(difference: torch.Tensor, second_moment: torch.Tensor, excluded: torch.Tensor | None = None) -> float:
    """E[|D x|^2] = tr(D E[x x^T] D^T) for D fp32 [N, K], zero under ``excluded``."""
    kept = difference if excluded is None else difference.masked_fill(excluded, 0)
    return float(((kept @ second_moment) * kept).sum())


def quantize(
    weight: torch.Tensor,
    statistics: InputStatistics,
    scheme: WeightScheme,
    *,
    dtype: torch.dtype,
    excluded: torch.Tensor | None = None,
) -> QuantizedDense:
    """An already scaled weight fp32 [N, K], rounded on ranges clipped for the (equally scaled) inputs."""
    importance = statistics.second_moment.diagonal()
    return clip.quantize(weight, scheme, dtype=dtype, importance=importance, excluded=excluded)
