"""A layer of routed experts in five launches, whatever the number of experts: ``requant_kernels.experts`` says what it
computes. Importing this needs no GPU and no triton.

All experts of a product are one layer, stacked along the rows; which of them run is data that stays on the device, so a
CUDA graph can record it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch.nn.functional import pad

from requant_kernels import gpu
from requant_kernels.dense_sparse.interface import LayerConfig
from requant_kernels.dense_sparse.triton.implementation import supports, unfit_dtype
from requant_kernels.dense_sparse.triton.layer import CODEBOOK, Layer, build
from requant_kernels.dense_sparse.triton.strips import ROW_ALIGNMENT
from requant_kernels.dense_sparse.triton.table import Table, Tile, evenly, table_of
from requant_kernels.scheme import LayerScheme
from requant_kernels.weight import DenseSparseWeight


@dataclass(frozen=True)
class Product:
    """One of the two products of all experts: tensors as ``layer.build`` makes them of the stack."""

    layer: Layer
    tensors: list[torch.Tensor]
    out_features: int

    @classmethod
    def of(cls, weights: Sequence[DenseSparseWeight], device: torch.device) -> Self:
        """Layers of one scheme and shape. Raises ValueError where they differ."""
        rows = {weight.out_features for weight in weights}
        if len(rows) > 1:
            raise ValueError(f"experts of {min(rows)} and of {max(rows)} rows can not be one layer")
        stack = DenseSparseWeight.concat_rows([_filled(weight).to(device) for weight in weights])
        tensors, meta = build(stack, routed=True)
        return cls(Layer.of(meta), list(tensors.values()), rows.pop())


def _filled(weight: DenseSparseWeight) -> DenseSparseWeight:
    """With as many empty rows behind it that the next expert begins with a tile of its own."""
    more = -weight.out_features % ROW_ALIGNMENT

    def filled(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else pad(tensor, (0, 0, 0, more))

    sparse = weight.sparse
    if sparse:
        offsets = sparse.row_offsets
        sparse = replace(sparse, row_offsets=torch.cat((offsets, offsets[-1:].expand(more))))
    return replace(
        weight,
        packed=pad(weight.packed, (0, 0, 0, more)),
        scale=filled(weight.scale),
        zero_point=filled(weight.zero_point),
        codebook=filled(weight.codebook),
        sparse=sparse,
    )


def can_implement(scheme: LayerScheme, dtype: torch.dtype, device: torch.device) -> tuple[bool, str]:
    """Whether layers of one ``scheme`` can be experts of such a layer on ``device``; the reason where they can not."""
    _, reason = gpu.able(device)
    reason = reason or ("int8 inputs" if scheme.activations else "bias corrections" if scheme.bias_correction else "")
    reason = reason or unfit_dtype(dtype)
    return not reason, reason


def unfit(weights: Iterable[DenseSparseWeight], dtype: torch.dtype, device: torch.device) -> str:
    """What about loaded ``weights`` the kernels do not take; nothing where they do."""
    return next(
        (why for able, why in (supports(LayerConfig.of(one, dtype, device)) for one in weights) if not able), ""
    )


class RoutedExperts:
    """gate_up: x [M, C] -> [M, 2 I], gates first, and down: [M, I] -> [M, C], of each expert. ``table`` overrides the
    launch configurations that belong to the device. Raises ValueError where the experts differ in scheme or shape."""

    def __init__(
        self,
        gate_up: Sequence[DenseSparseWeight],
        down: Sequence[DenseSparseWeight],
        device: torch.device,
        table: Table | None = None,
    ) -> None:
        self._experts = len(down)
        self._gate_up, self._down = Product.of(gate_up, device), Product.of(down, device)
        self._table = table or table_of(device)

    def __call__(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """x [M, C], ids [M, k] of each token's experts, and their weights [M, k] -> [M, C] of x's dtype.

        Sums in fp32, in the order of ids, of what the experts put out, rounded to x's dtype: the same input gives the
        same bits.
        """
        from requant_kernels.dense_sparse.triton.launch import Call, run
        from requant_kernels.dense_sparse.triton.route import activate, align, combine

        if not x.numel():
            return torch.empty_like(x)
        pdl, gate_up, down = self._table.pdl, self._gate_up, self._down
        tile = self._tile(*ids.shape)
        routing = align(ids.contiguous(), self._experts, tile, pdl)
        x = gpu.aligned(x.contiguous())
        h = run(Call(gate_up.layer, x, gate_up.tensors, None, gate_up.out_features, routing), self._table)
        h = activate(h, pdl)
        y = run(Call(down.layer, h, down.tensors, None, down.out_features, replace(routing, top=1)), self._table)
        return combine(y, weights.contiguous(), pdl)

    def warm_up(self, dtype: torch.dtype, device: torch.device, *, top: int, limit: int) -> None:
        """Compiles now what up to ``limit`` tokens of ``top`` experts each can reach."""
        from requant_kernels.dense_sparse.triton.launch import fitted, grid_of, most_splits
        from requant_kernels.dense_sparse.triton.route import routed_blocks

        ways = set()
        for tokens in range(1, limit + 1):
            tile = self._tile(tokens, top)
            blocks = routed_blocks(tokens * top, self._experts, tile.tokens)
            way: list[Any] = [tile]
            for product in (self._gate_up, self._down):
                fit = fitted(product.layer, tile, blocks, self._experts)
                _, _, splits = grid_of(product.layer, fit, blocks, self._experts, most_splits(device))
                way += [fit, splits > 1]
            if tuple(way) in ways:
                continue
            ways.add(tuple(way))
            ids = torch.arange(tokens * top, device=device, dtype=torch.int32).view(tokens, top) % self._experts
            x = torch.zeros(tokens, self._gate_up.layer.in_features, dtype=dtype, device=device)
            self(x, torch.zeros(tokens, top, device=device), ids)

    def _tile(self, tokens: int, top: int) -> Tile:
        """Of both products: for ``tokens`` of ``top`` experts each."""
        each, layers = evenly(tokens * top, self._experts), (self._gate_up.layer, self._down.layer)
        tiles = [self._table.routed(tokens, each, layer.bits, layer.kind == CODEBOOK) for layer in layers]
        return min(tiles, key=lambda tile: tile.tokens)
