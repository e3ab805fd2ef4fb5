"""The Triton kernels as an implementation that dispatch can choose. Importing this needs no GPU and no triton."""

from collections.abc import Collection
from functools import cache

import torch

from requant_kernels import gpu
from requant_kernels.dense_sparse.interface import Implementation, LayerConfig
from requant_kernels.dense_sparse.triton.layer import CODEBOOK, Layer, build
from requant_kernels.dense_sparse.triton.strips import STRIP
from requant_kernels.dense_sparse.triton.table import Table, table_of
from requant_kernels.prepared import Prepared
from requant_kernels.weight import DenseSparseWeight

DTYPES = (torch.bfloat16, torch.float16)


class Triton(Implementation):
    """Every scheme in bfloat16 and float16 on CUDA devices from compute capability 8.0 on.

    ``table`` overrides the launch configurations that belong to the device; ``launch`` decides what runs.
    """

    name = "triton"

    def __init__(self, table: Table | None = None) -> None:
        self._table = table
        self._warm_up = gpu.WarmUp()

    def can_implement(self, config: LayerConfig) -> tuple[bool, str]:
        there, reason = gpu.able(config.device)
        return supports(config) if there else (False, reason)

    def prepare(self, weight: DenseSparseWeight, config: LayerConfig) -> Prepared:
        """codes, steps and sparse entries as strips.py, patches.py, slots.py and lists.py lay them out."""
        tensors, meta = build(weight.to(config.device))
        return Prepared(self.name, weight.out_features, tensors, meta)

    def apply(
        self,
        x: torch.Tensor,
        tensors: list[torch.Tensor],
        bias: torch.Tensor | None,
        out_features: int,
        meta: list[int],
    ) -> torch.Tensor:
        from requant_kernels.dense_sparse.triton.launch import Call, run

        return run(Call(_layer(tuple(meta)), gpu.aligned(x), tensors, bias, out_features), self._table_of(x.device))

    def _table_of(self, device: torch.device) -> Table:
        return self._table or table_of(device)

    def warm_up(
        self, prepared: Prepared, dtype: torch.dtype, device: torch.device, *, limit: int, biased: Collection[bool]
    ) -> None:
        layer = _layer(prepared.meta)
        regimes = self._table_of(device).regimes(layer.bits, layer.kind == CODEBOOK)
        like = torch.empty(0, dtype=dtype, device=device)
        self._warm_up.run(self, prepared, layer.in_features, regimes=regimes, like=like, limit=limit, biased=biased)


@cache
def _layer(meta: tuple[int, ...]) -> Layer:
    return Layer.of(meta)


def unfit_dtype(dtype: torch.dtype) -> str:
    """Why the kernels do not take activations of ``dtype``; nothing where they do."""
    return "" if dtype in DTYPES else f"activations of {dtype}: serve with --dtype bfloat16 or float16"


def supports(config: LayerConfig) -> tuple[bool, str]:
    """Whether the kernels cover the layer, wherever it runs; the reason where they do not."""
    if reason := unfit_dtype(config.dtype):
        return False, reason
    if config.stored_dtype != config.dtype:
        return False, f"stored in {config.stored_dtype} but activations are {config.dtype}: serve in one dtype"
    if config.group_size % STRIP and config.group_size != config.in_features:
        width = config.group_size
        return False, f"groups of {width} columns after slicing, not a multiple of 16: lower the tensor-parallel degree"
    return True, ""
