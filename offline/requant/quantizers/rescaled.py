"""Fixed codes whose steps, and the sparse values beside them, can still be trained.

The idea of EfficientQAT's second phase (arXiv 2407.11062): what a base has balanced between roundings stays balanced,
while a few numbers per group learn from the whole model. Sparse values are ours.
"""

from dataclasses import replace

import torch
from requant_kernels.rounding.dense import QuantizedDense
from requant_kernels.rounding.grid import storable_scale
from torch import nn

from requant.quantizers.learned import FACTORS, through


class Rescaled(nn.Module):
    """A quantized uniform layer, differentiable in ``factor`` fp32 [N, G], which multiplies its steps, and ``values``.

    target fp32 [N, K]: what dense plus sparse shall equal where ``excluded`` (bool [N, K]) holds. Meant to be
    registered as the parametrization of the layer's weight.
    """

    def __init__(self, dense: QuantizedDense, target: torch.Tensor, excluded: torch.Tensor | None) -> None:
        super().__init__()
        assert dense.scale is not None
        self.dense, self.target, self.excluded = dense, target, excluded
        self.factor = nn.Parameter(torch.ones_like(dense.scale, dtype=torch.float32))
        self.values = None if excluded is None else nn.Parameter(target[excluded])

    def forward(self, _original: torch.Tensor | None = None) -> torch.Tensor:
        """fp32 [N, K]: what the stored layer will decode to."""
        scheme, zeros = self.dense.scheme, self.dense.zero_points
        codes = self.dense.codes.view(*self.factor.shape, -1).float()
        levels = codes - (scheme.midpoint if zeros is None else zeros[..., None].float())
        decoded = (levels * self._scale().float()[..., None]).flatten(1)
        if self.excluded is None:
            return decoded
        assert self.values is not None
        return decoded.masked_scatter(self.excluded, through(lambda v: v.to(self._dtype).float(), self.values))

    @property
    def _dtype(self) -> torch.dtype:
        assert self.dense.scale is not None
        return self.dense.scale.dtype

    def _scale(self) -> torch.Tensor:
        assert self.dense.scale is not None
        return through(lambda s: storable_scale(s, self._dtype).float(), self.dense.scale.float() * self.factor)

    @torch.no_grad()
    def project(self) -> None:
        """Back into the allowed set, after a step."""
        self.factor.clamp_(*FACTORS)

    @torch.no_grad()
    def quantized(self) -> tuple[QuantizedDense, torch.Tensor]:
        """(dense part, target fp32 [N, K]); dense plus sparse shall equal the target on the excluded entries."""
        return replace(self.dense, scale=self._scale().to(self._dtype)), self.forward()
