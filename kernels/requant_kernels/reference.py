"""What a number in a checkpoint means: every operation in plain torch, in fp32.

Kernels are fast versions of these functions and are tested against them; nothing else defines a value.
"""

from typing import NamedTuple

import torch

from requant_kernels.layer import QuantizedLayer
from requant_kernels.scheme import ActivationScheme, WeightScheme
from requant_kernels.w8a8.weight import W8A8Weight
from requant_kernels.weight import DenseSparseWeight


def dequantize_dense(weight: DenseSparseWeight) -> torch.Tensor:
    """The dense part, fp32 [N, K]: (code - zero_point) * scale, or codebook[row, code]."""
    return decode(weight.scheme.weights, weight.codes(), weight.scale, weight.zero_points(), weight.codebook)


def decode(
    scheme: WeightScheme,
    codes: torch.Tensor,
    scale: torch.Tensor | None,
    zero_points: torch.Tensor | None,
    codebook: torch.Tensor | None,
) -> torch.Tensor:
    """What ``dequantize_dense`` says, of codes uint8 [N, K] that are not packed; scale, zero_points [N, G]."""
    if codebook is not None:
        return torch.gather(codebook.float(), 1, codes.long())
    assert scale is not None
    grouped = codes.float().view(*scale.shape, -1)
    offset = scheme.midpoint if zero_points is None else zero_points.float()[..., None]
    return ((grouped - offset) * scale.float()[..., None]).view(codes.shape)


def dequantize(weight: QuantizedLayer) -> torch.Tensor:
    """W, fp32 [N, K]: dense + sparse, or the int8 codes times their steps."""
    if isinstance(weight, W8A8Weight):
        return weight.codes.float() * weight.scale.float()[:, None]
    dense = dequantize_dense(weight)
    if weight.sparse is not None:
        dense[weight.sparse.rows(), weight.sparse.columns.long()] += weight.sparse.values.float()
    return dense


def dense_sparse_linear(x: torch.Tensor, weight: DenseSparseWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """y = x W^T + bias + bias_correction, accumulated in fp32: x [..., K] of any float dtype -> [..., N] of the same
    dtype."""
    return _finish(x.float() @ dequantize(weight).T, weight, bias, x.dtype)


class QuantizedInput(NamedTuple):
    """x [..., K] is about (codes - zero_point) * scale.

    codes int8 [..., K]; scale fp32 and zero_point int32 [..., 1].
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor

    def dequantize(self) -> torch.Tensor:
        """fp32 [..., K]."""
        return (self.codes.to(torch.int32) - self.zero_point).float() * self.scale


def quantize_input(
    x: torch.Tensor,
    scheme: ActivationScheme,
    static_scale: torch.Tensor | None = None,
    static_zero_point: torch.Tensor | None = None,
) -> QuantizedInput:
    """x [..., K] of any float dtype -> int8: code = clamp(rint(x * (1 / scale)) + zero_point, -128, 127), in fp32.

    Dynamic: one scale (and zero point) per token, from its range, which always includes zero. Static: the ones given,
    fp32 [1] and int8 [1]. A dynamic token of zeros has scale 0 and decodes to zeros.
    """
    x = x.float()
    if not scheme.dynamic:
        assert static_scale is not None
        shape = (*x.shape[:-1], 1)
        scale = static_scale.float().expand(shape)
        zero_point = torch.zeros(shape, dtype=torch.int32, device=x.device)
        if static_zero_point is not None:
            zero_point = zero_point + static_zero_point.to(torch.int32)
    elif scheme.symmetric:
        scale = x.abs().amax(-1, keepdim=True) / 127
        zero_point = torch.zeros_like(scale, dtype=torch.int32)
    else:
        low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
        scale = (high - low) / 255
        zero_point = (-128 - (low * _inverse(scale)).round()).to(torch.int32)
    codes = ((x * _inverse(scale)).round() + zero_point).clamp(-128, 127)
    return QuantizedInput(codes.to(torch.int8), scale, zero_point)


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    """1 / scale, and 0 for the scale 0 of a token of zeros."""
    return torch.where(scale > 0, 1 / scale, torch.zeros_like(scale))


def w8a8_linear(x: torch.Tensor, weight: W8A8Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """y = (x_q - z) W_q^T * (s_x s_w) + bias + bias_correction: x [..., K] of any float dtype -> [..., N] of the same.

    The sum over K is exact (integers); only the products with the steps and the sums of biases round, in fp32.
    """
    assert weight.scheme.activations is not None
    quantized = quantize_input(x, weight.scheme.activations, weight.input_scale, weight.input_zero_point)
    centred = (quantized.codes.to(torch.int32) - quantized.zero_point).double()
    accumulated = (centred @ weight.codes.double().T).float()
    return _finish(accumulated * (quantized.scale * weight.scale.float()), weight, bias, x.dtype)


def linear(x: torch.Tensor, weight: QuantizedLayer, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The layer's output [..., N] for x [..., K], of whichever kind it is."""
    if isinstance(weight, W8A8Weight):
        return w8a8_linear(x, weight, bias)
    return dense_sparse_linear(x, weight, bias)


def _finish(y: torch.Tensor, weight: QuantizedLayer, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    for vector in (bias, weight.bias_correction):
        if vector is not None:
            y = y + vector.float()
    return y.to(dtype)
