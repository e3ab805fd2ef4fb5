"""The levels that a row's codes may take: uniform steps per group, or a codebook per row. Pure; shared by all bases."""

from dataclasses import dataclass, replace

import torch

from requant_kernels.rounding.dense import QuantizedDense
from requant_kernels.scheme import WeightScheme


@dataclass(frozen=True)
class Grid:
    """scale [N, G] with zero fp32 [N, G] (integers), or codebook [N, 2**b]; scale and codebook in the model's dtype."""

    scheme: WeightScheme
    scale: torch.Tensor | None = None
    zero: torch.Tensor | None = None
    codebook: torch.Tensor | None = None

    @classmethod
    def spanning(cls, low: torch.Tensor, high: torch.Tensor, scheme: WeightScheme, dtype: torch.dtype) -> "Grid":
        """The uniform grid from ``low`` to ``high`` (fp32 [N, G]), its scale rounded to ``dtype``.

        A symmetric step is absmax / (levels/2 - 1/2), so that neither end errs by more than half a step; an asymmetric
        range always holds zero, because the zero point is itself a code.
        """
        low, high, top = low.clamp(max=0), high.clamp(min=0), scheme.levels - 1
        if scheme.symmetric:
            scale = storable_scale(torch.maximum(high, -low) * (2 / top), dtype)
            return cls(scheme, scale, torch.full_like(low, scheme.midpoint))
        # two divisions, because high - low may overflow
        scale = storable_scale(high / top - low / top, dtype)
        return cls(scheme, scale, torch.round(-low / scale.float()).clamp(0, top))

    def codes(self, weight: torch.Tensor) -> torch.Tensor:
        """The code of the nearest level: fp32 [N, K] -> uint8 [N, K]."""
        if self.codebook is not None:
            levels, order = self.codebook.float().sort(1)
            between = (levels[:, 1:] + levels[:, :-1]) / 2
            return order.gather(1, torch.searchsorted(between, weight.contiguous())).to(torch.uint8)
        assert self.scale is not None
        assert self.zero is not None
        rows, groups = self.scale.shape
        grouped = weight.reshape(rows, groups, -1)
        codes = torch.round(grouped / self.scale.float()[..., None]) + self.zero[..., None]
        return codes.clamp(0, self.scheme.levels - 1).to(torch.uint8).reshape(weight.shape)

    def dense(self, codes: torch.Tensor) -> QuantizedDense:
        """The stored form of ``codes`` (uint8 [N, K]) on this grid."""
        zeros = None if self.zero is None or self.scheme.symmetric else self.zero.to(torch.uint8)
        return QuantizedDense(self.scheme, codes, scale=self.scale, zero_points=zeros, codebook=self.codebook)

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """uint8 [N, K] -> fp32 [N, K]: the same numbers as the reference decodes."""
        if self.codebook is not None:
            return self.codebook.float().gather(1, codes.long())
        assert self.scale is not None
        assert self.zero is not None
        grouped = codes.float().reshape(*self.scale.shape, -1)
        return ((grouped - self.zero[..., None]) * self.scale.float()[..., None]).reshape(codes.shape)

    def nearest(self, weight: torch.Tensor) -> torch.Tensor:
        """fp32 [N, K] -> its nearest levels, fp32 [N, K]."""
        return self.values(self.codes(weight))

    def columns(self, index: torch.Tensor, group_size: int) -> "Grid":
        """The grid of the columns ``index`` (int64 [C]) alone, one group each; ``group_size``: that of this grid."""
        if self.codebook is not None:
            return self
        assert self.scale is not None
        assert self.zero is not None
        return replace(self, scale=self.scale[:, index // group_size], zero=self.zero[:, index // group_size])


def storable_scale(step: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``step`` fp32 >= 0 rounded to ``dtype``, always positive: 1 where the group is all zero, and never rounded to
    zero. Normal numbers only, except in fp16, whose normal range ends at 6e-5, within reach of real weights."""
    smallest = 2.0**-24 if dtype == torch.float16 else torch.finfo(dtype).tiny
    return torch.where(step == 0, torch.ones_like(step), step).clamp(min=smallest).to(dtype)
