"""The operators that torch.compile and CUDA graphs see as one node each, registered once per process."""

from typing import Any

import torch

from requant_kernels.dense_sparse.dispatch import IMPLEMENTATIONS
from requant_kernels.dense_sparse.interface import Prepared

_SCHEMA = (
    "dense_sparse_linear(Tensor x, Tensor[] weights, Tensor? bias, str implementation, int out_features, int[] meta)"
    " -> Tensor"
)


def dense_sparse_linear(x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None = None) -> torch.Tensor:
    """y = x W^T + bias with a layer that dispatch prepared: x [..., K] -> [..., N] of x's dtype."""
    return torch.ops.requant.dense_sparse_linear.default(
        x, list(prepared.tensors.values()), bias, prepared.implementation, prepared.out_features, list(prepared.meta)
    )


def _dense_sparse_linear(  # noqa: PLR0917 (the schema is positional)
    x: torch.Tensor,
    weights: list[torch.Tensor],
    bias: torch.Tensor | None,
    implementation: str,
    out_features: int,
    meta: list[int],
) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    if not rows.shape[0]:
        return x.new_empty(*x.shape[:-1], out_features)
    y = IMPLEMENTATIONS[implementation].apply(rows, weights, bias, out_features, meta)
    return y.view(*x.shape[:-1], out_features)


def _fake(  # noqa: PLR0917
    x: torch.Tensor,
    weights: list[torch.Tensor],
    bias: torch.Tensor | None,
    implementation: str,
    out_features: int,
    meta: list[int],
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


if not hasattr(torch.ops.requant, "dense_sparse_linear"):
    # Library and not torch.library.custom_op: its checks cost more than a small layer takes for one token.
    _LIBRARY: Any = torch.library.Library("requant", "FRAGMENT")  # type: ignore[no-untyped-call]
    _LIBRARY.define(_SCHEMA)
    _LIBRARY.impl("dense_sparse_linear", _dense_sparse_linear, "CompositeExplicitAutograd")
    torch.library.register_fake("requant::dense_sparse_linear", _fake, lib=_LIBRARY)
