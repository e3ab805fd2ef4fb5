"""The operators that torch.compile and CUDA graphs see as one node each, registered once per process."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from requant_kernels.dense_sparse import dispatch as dense_sparse
from requant_kernels.prepared import Prepared, Runs
from requant_kernels.w8a8 import dispatch as w8a8

_ARGUMENTS = "(Tensor x, Tensor[] weights, Tensor? bias, str implementation, int out_features, int[] meta) -> Tensor"


def dense_sparse_linear(x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None = None) -> torch.Tensor:
    """y = x W^T + bias with a layer that dispatch prepared: x [..., K] -> [..., N] of x's dtype."""
    return run_dense_sparse(x, *_parts(prepared, bias))


def w8a8_linear(x: torch.Tensor, prepared: Prepared, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The same with a W8A8 layer, which rounds x to int8 first."""
    return run_w8a8(x, *_parts(prepared, bias))


def _parts(prepared: Prepared, bias: torch.Tensor | None) -> tuple[Any, ...]:
    tensors, meta = list(prepared.tensors.values()), list(prepared.meta)
    return tensors, bias, prepared.implementation, prepared.out_features, meta


_Linear = Callable[..., torch.Tensor]


def _operator(implementations: Mapping[str, Runs]) -> _Linear:
    def linear(  # noqa: PLR0917 (the schema is positional)
        x: torch.Tensor,
        weights: list[torch.Tensor],
        bias: torch.Tensor | None,
        implementation: str,
        out_features: int,
        meta: list[int],
    ) -> torch.Tensor:
        if not x.numel():
            return x.new_empty(*x.shape[:-1], out_features)
        apply = implementations[implementation].apply
        if x.dim() == 2 and x.is_contiguous():  # as vLLM calls it: views cost as much as a small product
            return apply(x, weights, bias, out_features, meta)
        y = apply(x.reshape(-1, x.shape[-1]).contiguous(), weights, bias, out_features, meta)
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


def _register(name: str, implementations: Mapping[str, Runs]) -> _Linear:
    """The operator of that ``name`` for torch.compile; without it, the same function: the way through torch's
    dispatcher takes longer than the product of a small layer with one token."""
    linear = _operator(implementations)
    # Library and not torch.library.custom_op: its checks cost more than a small layer takes for one token.
    library: Any = torch.library.Library("requant", "FRAGMENT")  # type: ignore[no-untyped-call]
    library.define(name + _ARGUMENTS)
    library.impl(name, linear, "CompositeExplicitAutograd")
    torch.library.register_fake(f"requant::{name}", _fake, lib=library)
    _LIBRARIES.append(library)
    operator = getattr(torch.ops.requant, name).default

    def run(
        x: torch.Tensor, weights: list[torch.Tensor], bias: torch.Tensor | None, implementation: str, *layer: Any
    ) -> torch.Tensor:
        chosen = implementations[implementation]
        if chosen.traceable:
            return chosen.apply(x, weights, bias, *layer)
        call = operator if torch.compiler.is_compiling() else linear
        return call(x, weights, bias, implementation, *layer)

    return run


_LIBRARIES: list[Any] = []  # an operator is unregistered when its library is freed
# x, then what Prepared holds: for layers whose tensors live elsewhere
run_dense_sparse = _register("dense_sparse_linear", dense_sparse.IMPLEMENTATIONS)
run_w8a8 = _register("w8a8_linear", w8a8.IMPLEMENTATIONS)
