"""The operators that torch.compile and CUDA graphs see as one node each, registered once per process."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from requant_kernels.dense_sparse import dispatch as dense_sparse
from requant_kernels.dense_sparse.interface import Prepared
from requant_kernels.w8a8 import dispatch as w8a8

_ARGUMENTS = "(Tensor x, Tensor[] weights, Tensor? bias, str implementation, int out_features, int[] meta) -> Tensor"


def dense_sparse_linear(x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None = None) -> torch.Tensor:
    """y = x W^T + bias with a layer that dispatch prepared: x [..., K] -> [..., N] of x's dtype."""
    return _call(torch.ops.requant.dense_sparse_linear.default, x, prepared, bias)


def w8a8_linear(x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The same with a W8A8 layer, which rounds x to int8 first."""
    return _call(torch.ops.requant.w8a8_linear.default, x, prepared, bias)


def _call(operator: Any, x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None) -> torch.Tensor:
    return operator(
        x, list(prepared.tensors.values()), bias, prepared.implementation, prepared.out_features, list(prepared.meta)
    )


class _Runs(Protocol):
    def apply(
        self,
        x: torch.Tensor,
        tensors: list[torch.Tensor],
        bias: torch.Tensor | None,
        out_features: int,
        meta: list[int],
    ) -> torch.Tensor: ...


def _operator(implementations: Mapping[str, _Runs]) -> Any:
    def linear(  # noqa: PLR0917 (the schema is positional)
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
        y = implementations[implementation].apply(rows, weights, bias, out_features, meta)
        return y.view(*x.shape[:-1], out_features)

    return linear


def _fake(  # noqa: PLR0917
    x: torch.Tensor,
    weights: list[torch.Tensor],
    bias: torch.Tensor | None,
    implementation: str,
    out_features: int,
    meta: list[int],
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


def _register(name: str, implementations: Mapping[str, _Runs]) -> None:
    if hasattr(torch.ops.requant, name):
        return
    # Library and not torch.library.custom_op: its checks cost more than a small layer takes for one token.
    library: Any = torch.library.Library("requant", "FRAGMENT")  # type: ignore[no-untyped-call]
    library.define(name + _ARGUMENTS)
    library.impl(name, _operator(implementations), "CompositeExplicitAutograd")
    torch.library.register_fake(f"requant::{name}", _fake, lib=library)
    _LIBRARIES.append(library)


_LIBRARIES: list[Any] = []  # an operator is unregistered when its library is freed
_register("dense_sparse_linear", dense_sparse.IMPLEMENTATIONS)
_register("w8a8_linear", w8a8.IMPLEMENTATIONS)
