"""The Triton kernels as an implementation that dispatch can choose. Importing this needs no GPU and no triton."""

from collections.abc import Iterable
from importlib.util import find_spec

import torch

from requant_kernels.dense_sparse.interface import Prepared
from requant_kernels.w8a8.interface import LayerConfig
from requant_kernels.w8a8.runtime import Runtime
from requant_kernels.w8a8.triton.table import Table, table_of
from requant_kernels.w8a8.weight import W8A8Weight

CAPABILITY = (8, 0)


class Triton:
    """Every W8A8 scheme on CUDA devices from compute capability 8.0 on.

    ``table`` overrides the launch configurations that belong to the device; ``launch`` decides what runs.
    """

    name = "triton"

    def __init__(self, table: Table | None = None) -> None:
        self._table = table

    def can_implement(self, config: LayerConfig) -> tuple[bool, str]:
        if config.device.type != "cuda":
            return False, f"runs on CUDA devices, not on {config.device.type}"
        if not find_spec("triton"):
            return False, "the package triton is not installed"
        if torch.version.hip is None and torch.cuda.get_device_capability(config.device) < CAPABILITY:
            return False, "needs compute capability 8.0 (Ampere) or later"
        return True, ""

    def prepare(self, weight: W8A8Weight, config: LayerConfig) -> Prepared:
        """operand: the codes int8 [N, K] as they are stored."""
        there = weight.to(config.device)
        tensors, meta = Runtime.of(there, there.codes.contiguous(), there.scale.float()).store()
        return Prepared(self.name, weight.out_features, tensors, meta)

    def apply(
        self,
        x: torch.Tensor,
        tensors: list[torch.Tensor],
        bias: torch.Tensor | None,
        out_features: int,
        meta: list[int],
    ) -> torch.Tensor:
        from requant_kernels.w8a8.triton.launch import run

        aligned = x if x.data_ptr() % 16 == 0 else x.clone()  # kernels are compiled for 16-byte copies only
        return run(aligned, Runtime.load(tensors, meta), bias, self._table or table_of(x.device))

    def warm_up(
        self, layers: Iterable[Prepared], dtype: torch.dtype, device: torch.device, limit: int | None = None
    ) -> int:
        """Runs every kernel that serving ``layers`` with up to ``limit`` tokens can reach, with and without a bias:
        none is compiled later. Layers of one kind share their kernels and run once. Returns the number of calls."""
        kinds = {
            (*prepared.tensors["operand"].shape, *prepared.meta): prepared
            for prepared in layers
            if prepared.implementation == self.name
        }
        table, calls = self._table or table_of(device), 0
        for (rows, columns, *_), prepared in kinds.items():
            for tokens in table.regimes(rows, columns):
                if limit is not None and tokens > limit:
                    continue
                x = torch.zeros(tokens, columns, dtype=dtype, device=device)
                for bias in (None, x.new_zeros(rows)):
                    self.apply(x, list(prepared.tensors.values()), bias, rows, list(prepared.meta))
                    calls += 1
        return calls
