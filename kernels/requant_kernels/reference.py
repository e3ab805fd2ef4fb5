"""What a number in a checkpoint means: every operation in plain torch, in fp32.

Kernels are fast versions of these functions and are tested against them; nothing else defines a value.
"""

import torch

from requant_kernels.weight import DenseSparseWeight


def dequantize_dense(weight: DenseSparseWeight) -> torch.Tensor:
    """The dense part, fp32 [N, K]: (code - zero_point) * scale, or codebook[row, code]."""
    codes = weight.codes()
    if weight.codebook is not None:
        return torch.gather(weight.codebook.float(), 1, codes.long())
    assert weight.scale is not None
    zeros = weight.zero_points()
    grouped = codes.float().view(weight.out_features, weight.groups, weight.group_size)
    offset = weight.scheme.weights.midpoint if zeros is None else zeros.float()[..., None]
    return ((grouped - offset) * weight.scale.float()[..., None]).view(weight.out_features, weight.in_features)


def dequantize(weight: DenseSparseWeight) -> torch.Tensor:
    """W = dense + sparse, fp32 [N, K]."""
    dense = dequantize_dense(weight)
    if weight.sparse is not None:
        dense[weight.sparse.rows(), weight.sparse.columns.long()] += weight.sparse.values.float()
    return dense


def dense_sparse_linear(x: torch.Tensor, weight: DenseSparseWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """y = x W^T + bias, accumulated in fp32: x [..., K] of any float dtype -> [..., N] of the same dtype."""
    y = x.float() @ dequantize(weight).T
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype)
