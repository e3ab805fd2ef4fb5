"""Fixed codes whose steps or codebooks, and the sparse values beside them, can still be trained.

The idea of EfficientQAT's second phase (arXiv 2407.11062): what a base has balanced between roundings stays balanced,
while a few numbers per group learn from the whole model. Codebooks and sparse values are ours.
"""

from dataclasses import replace

import torch
from requant_kernels.rounding.dense import QuantizedDense
from requant_kernels.rounding.grid import storable_scale
from requant_kernels.scheme import WeightScheme
from torch import nn

from requant.quantizers.learned import FACTORS, through


class Rescaled(nn.Module):
    """A quantized layer, differentiable in ``shift`` fp32, zero at first, by which its steps [N, G] change relative to
    themselves, or its codebook [N, 2**b] relative to the mean size of its row's levels, and in ``values``.

    target fp32 [N, K]: what dense plus sparse shall equal where ``excluded`` (bool [N, K]) holds, the sparse values to
    start from. Meant to be registered as the parametrization of the layer's weight.
    """

    def __init__(self, dense: QuantizedDense, target: torch.Tensor, excluded: torch.Tensor | None) -> None:
        super().__init__()
        self.dense, self.excluded = dense, excluded
        self.shift = nn.Parameter(torch.zeros_like(self._start))
        self.values = None if excluded is None else nn.Parameter(target[excluded])

    def forward(self, _original: torch.Tensor | None = None) -> torch.Tensor:
        """fp32 [N, K]: what the stored layer will decode to."""
        codes, levels = self.dense.codes, self._levels()
        if self.dense.codebook is not None:
            decoded = levels.gather(1, codes.long())
        else:
            scheme, zeros = self.dense.scheme, self.dense.zero_points
            steps = codes.view(*levels.shape, -1).float() - (scheme.midpoint if zeros is None else zeros[..., None])
            decoded = (steps * levels[..., None]).flatten(1)
        if self.excluded is None:
            return decoded
        assert self.values is not None
        return decoded.masked_scatter(self.excluded, through(lambda v: v.to(self._dtype).float(), self.values))

    @property
    def scheme(self) -> WeightScheme:
        return self.dense.scheme

    @property
    def mean_step(self) -> float:
        """Mean distance between neighbouring levels."""
        if self.dense.codebook is None:
            return float(self._start.mean())
        low, high = self._start.aminmax(dim=1)
        return float((high - low).mean()) / (self.scheme.levels - 1)

    @torch.no_grad()
    def project(self) -> None:
        """Back into the allowed set, after a step."""
        self.shift.clamp_(*(factor - 1 for factor in FACTORS))

    @torch.no_grad()
    def quantized(self) -> tuple[QuantizedDense, torch.Tensor]:
        """(dense part, target fp32 [N, K]); dense plus sparse shall equal the target on the excluded entries."""
        levels = self._levels().to(self._dtype)
        if self.dense.codebook is None:
            return replace(self.dense, scale=levels), self.forward()
        return replace(self.dense, codebook=levels), self.forward()

    @property
    def _stored(self) -> torch.Tensor:
        stored = self.dense.scale if self.dense.codebook is None else self.dense.codebook
        assert stored is not None
        return stored

    @property
    def _start(self) -> torch.Tensor:
        return self._stored.float()

    @property
    def _dtype(self) -> torch.dtype:
        return self._stored.dtype

    def _levels(self) -> torch.Tensor:
        """The steps, or the codebook, as they would be stored; fp32."""
        start = self._start
        if self.dense.codebook is None:
            return through(lambda s: storable_scale(s, self._dtype).float(), start + self.shift * start)
        unit = start.abs().mean(1, keepdim=True)
        return through(lambda levels: levels.to(self._dtype).float(), start + self.shift * unit)
