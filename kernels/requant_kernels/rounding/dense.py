"""What every base quantizer returns, and how it becomes a stored layer with the sparse part beside it."""

from dataclasses import dataclass

import torch

from requant_kernels.reference import decode
from requant_kernels.scheme import W8A8_WEIGHTS, LayerScheme, SparseScheme, WeightScheme
from requant_kernels.sparse import SparsePart
from requant_kernels.w8a8.weight import W8A8Weight
from requant_kernels.weight import DenseSparseWeight


@dataclass(frozen=True)
class QuantizedDense:
    """The dense part before packing: codes uint8 [N, K]; scale [N, K/g] in the model's dtype and zero_points uint8
    [N, K/g] (asymmetric only), or codebook [N, 2**b]."""

    scheme: WeightScheme
    codes: torch.Tensor
    scale: torch.Tensor | None = None
    zero_points: torch.Tensor | None = None
    codebook: torch.Tensor | None = None

    def pack(self, sparse: SparsePart | None = None) -> DenseSparseWeight:
        return DenseSparseWeight.from_codes(
            LayerScheme(self.scheme, None if sparse is None else SparseScheme()),
            self.codes,
            scale=self.scale,
            zero_points=self.zero_points,
            codebook=self.codebook,
            sparse=sparse,
        )

    def pack_w8a8(self, scheme: LayerScheme) -> W8A8Weight:
        """Of 8 bits and one step a row: a layer without a bias correction, whose input step, if ``scheme`` has static
        ones, is still to be found."""
        assert self.scheme == W8A8_WEIGHTS
        assert self.scale is not None
        codes = (self.codes.to(torch.int16) - W8A8_WEIGHTS.midpoint).to(torch.int8)
        return W8A8Weight(LayerScheme(W8A8_WEIGHTS, activations=scheme.activations), codes, self.scale.flatten())

    def dequantize(self) -> torch.Tensor:
        """fp32 [N, K], by the reference."""
        return decode(self.scheme, self.codes, self.scale, self.zero_points, self.codebook)


def attach_residual(
    weight: torch.Tensor, dense: QuantizedDense, mask: torch.Tensor, dtype: torch.dtype
) -> DenseSparseWeight:
    """The stored layer whose entries under ``mask`` [N, K] carry what the dense part misses there, in ``dtype``.

    weight fp32 [N, K] is the target; W = dense + sparse by construction (the residual form of SpQR, arXiv 2306.03078).
    """
    residual = (weight - dense.dequantize()).to(dtype)
    return dense.pack(SparsePart.from_mask(residual, mask))
