"""Learned rounding: which way each weight is rounded, and where each group is clipped, as trainable numbers.

The idea of AutoRound (SignRound, arXiv 2309.05516): W~ = s (clip(round(W / s + V) + z, 0, 2^b - 1) - z) with V in
[-1/2, 1/2] and the ends of each group's range scaled by factors; s and z follow from the range. Rounding is
the identity in the backward pass. Excluded entries (ours) are trainable values of the sparse part.
"""

import torch
from requant_kernels.rounding.dense import QuantizedDense
from requant_kernels.rounding.grid import Grid, storable_scale
from requant_kernels.scheme import WeightScheme
from torch import nn

FACTORS = (0.2, 2.0)  # of the initial ranges or steps: a scale of zero would have no gradient that leads back


class LearnedRounding(nn.Module):
    """The weight of one linear layer, quantized differentiably.

    anchor fp32 [N, K]: what is rounded; the original weight, or the compensated one of GPTQ, whose codes are then where
    training starts. low, high fp32 [N, G]: the ranges to start from (clip.search). excluded bool [N, K]. Meant to be
    registered as the parametrization of the layer's weight.
    """

    def __init__(
        self,
        anchor: torch.Tensor,
        low: torch.Tensor,
        high: torch.Tensor,
        scheme: WeightScheme,
        *,
        dtype: torch.dtype,
        excluded: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.scheme, self.dtype, self.excluded = scheme, dtype, excluded
        self.low, self.high = low.clamp(max=0), high.clamp(min=0)  # zero is in every range, as in Grid.spanning
        kept = anchor if excluded is None else anchor.masked_fill(excluded, 0)
        self.kept = kept.reshape(*low.shape, -1)
        self.low_factor = nn.Parameter(torch.ones_like(low))
        self.high_factor = nn.Parameter(torch.ones_like(low))
        self.offset = nn.Parameter(torch.zeros_like(self.kept))
        self.values = None if excluded is None else nn.Parameter(anchor[excluded])

    def forward(self, _original: torch.Tensor | None = None) -> torch.Tensor:
        """fp32 [N, K]: what the stored layer will decode to, differentiable in the parameters."""
        scale, zero = self._grid()
        codes = through(torch.round, self.kept / scale + self.offset) + zero
        dense = ((codes.clamp(0, self.scheme.levels - 1) - zero) * scale).flatten(1)
        if self.excluded is None:
            return dense
        assert self.values is not None
        return dense.masked_scatter(self.excluded, through(lambda v: v.to(self.dtype).float(), self.values))

    def _grid(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(scale, zero), [N, G, 1]; the differentiable twin of Grid.spanning."""
        low, high, top = self.low * self.low_factor, self.high * self.high_factor, self.scheme.levels - 1
        step = torch.maximum(high, -low) * (2 / top) if self.scheme.symmetric else high / top - low / top
        scale = through(lambda s: storable_scale(s, self.dtype).float(), step)[..., None]
        if self.scheme.symmetric:
            return scale, torch.full_like(scale, self.scheme.midpoint)
        return scale, through(torch.round, -low[..., None] / scale).clamp(0, top)

    @property
    def mean_step(self) -> float:
        """Mean distance between neighbouring levels."""
        with torch.no_grad():
            return float(self._grid()[0].mean())

    @torch.no_grad()
    def project(self) -> None:
        """Back into the allowed set, after a step."""
        self.offset.clamp_(-0.5, 0.5)
        for factor in (self.low_factor, self.high_factor):
            factor.clamp_(*FACTORS)

    @torch.no_grad()
    def quantized(self) -> tuple[QuantizedDense, torch.Tensor]:
        """(dense part, target fp32 [N, K]); dense plus sparse shall equal the target on the excluded entries."""
        grid = Grid.spanning(self.low * self.low_factor, self.high * self.high_factor, self.scheme, self.dtype)
        assert grid.scale is not None
        assert grid.zero is not None
        codes = torch.round(self.kept / grid.scale.float()[..., None] + self.offset) + grid.zero[..., None]
        codes = codes.clamp(0, self.scheme.levels - 1).to(torch.uint8)
        return grid.dense(codes.flatten(1)), self.forward()


def through(function, x: torch.Tensor) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """function(x) forward, the identity backward (straight-through estimator)."""
    return x + (function(x) - x).detach()
