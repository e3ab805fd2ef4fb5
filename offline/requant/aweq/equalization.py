"""Scales that share the quantization error between a layer's input channels and its weight columns.

With X' = X / s and W' = W s the product is the same. AWEQ (arXiv 2311.01305; PAPERS: by secondary summaries) takes the
ranges max - min and s = sqrt(r(X) / r(W)), which makes both ranges equal; SmoothQuant (arXiv 2211.10438, Eq. 4) takes
the largest magnitudes and s = r(X)^alpha / r(W)^(1 - alpha). Both are ``scales`` here.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Self

import torch

RangeKind = Literal["minmax", "absmax"]
# Of the median r(X), below which no channel counts (ours; SmoothQuant has 1e-5). A later token may be at home where
# calibration was nearly silent: its int8 step then grows 16^alpha times, not thousands of times. Channels that narrow
# lose little by it: of the error of inputs each still adds 16^(-2 alpha) of what a median one does.
FLOOR = 1 / 16


@dataclass(frozen=True)
class ChannelRange:
    """The smallest and the largest value of each channel so far: fp32 [C]."""

    low: torch.Tensor
    high: torch.Tensor

    @classmethod
    def of(cls, values: torch.Tensor) -> Self:
        """values [..., C], at least one of each channel."""
        flat = values.reshape(-1, values.shape[-1]).float()
        return cls(flat.amin(0), flat.amax(0))

    def union(self, other: "ChannelRange") -> "ChannelRange":
        return ChannelRange(torch.minimum(self.low, other.low), torch.maximum(self.high, other.high))

    def divided(self, scale: torch.Tensor) -> "ChannelRange":
        """By ``scale`` [C] > 0."""
        return ChannelRange(self.low / scale, self.high / scale)

    def width(self, kind: RangeKind) -> torch.Tensor:
        """minmax: max - min (AWEQ); absmax: max |.| (SmoothQuant). fp32 [C]."""
        if kind == "minmax":
            return self.high - self.low
        return torch.maximum(self.low.abs(), self.high.abs())


def weight_range(weights: Iterable[torch.Tensor], kind: RangeKind) -> torch.Tensor:
    """r(W) fp32 [K]: of each column, the largest over all ``weights`` [N, K] that share the input."""
    return torch.stack([ChannelRange.of(weight).width(kind) for weight in weights]).amax(0)


def scales(activations: torch.Tensor, weights: torch.Tensor, alpha: float = 0.5) -> torch.Tensor:
    """s = r(X)^alpha / r(W)^(1 - alpha), fp32 [C], with r(X) no less than FLOOR of its median; alpha 1/2 is AWEQ's.

    A channel that no calibration token activates, or that no weight reads, keeps s = 1: there is nothing to share.
    """
    alive = (activations > 0) & (weights > 0)
    one = torch.ones_like(activations)
    median = activations.where(alive, torch.nan).nanmedian()
    x, w = torch.where(alive, activations.clamp(min=FLOOR * median), one), torch.where(alive, weights, one)
    return x**alpha / w ** (1 - alpha)


def fold_heads(columns: torch.Tensor, rows: int, head_dim: int) -> torch.Tensor:
    """The largest over the query heads that share a key/value head: [H * d] -> [rows] with rows = G * d, H >= G."""
    return columns.view(rows // head_dim, -1, head_dim).amax(1).flatten()


def spread_heads(scale: torch.Tensor, columns: int, head_dim: int) -> torch.Tensor:
    """The scale of each value row [G * d], at the columns [H * d] that read it."""
    groups = scale.view(-1, 1, head_dim)
    return groups.expand(-1, columns // len(scale), -1).flatten()
