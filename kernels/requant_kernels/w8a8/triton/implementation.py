"""The Triton kernels as an implementation that dispatch can choose. Importing this needs no GPU and no triton."""

from importlib.util import find_spec

import torch

from requant_kernels.dense_sparse.interface import Prepared
from requant_kernels.w8a8.interface import Implementation, LayerConfig
from requant_kernels.w8a8.runtime import Runtime
from requant_kernels.w8a8.triton.table import Table, table_of
from requant_kernels.w8a8.weight import W8A8Weight

CAPABILITY = (8, 0)


class Triton(Implementation):
    """Every W8A8 scheme on CUDA devices from compute capability 8.0 on.

    ``table`` overrides the launch configurations that belong to the device; ``launch`` decides what runs.
    """

    name = "triton"

    def __init__(self, table: Table | None = None) -> None:
        self._table = table
        self._warm: set[tuple[object, ...]] = set()

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

    def warm_up(self, prepared: Prepared, dtype: torch.dtype, device: torch.device, limit: int) -> None:
        """Runs every kernel that serving ``prepared`` with up to ``limit`` tokens can reach, with and without a bias:
        none is compiled later. Layers of one kind share their kernels: only the first of them runs."""
        rows, columns = prepared.tensors["operand"].shape
        kind = (rows, columns, *prepared.meta, dtype, device, limit)
        if kind in self._warm:
            return
        self._warm.add(kind)
        for tokens in (self._table or table_of(device)).regimes(rows, columns):
            if tokens <= limit:
                x = torch.zeros(tokens, columns, dtype=dtype, device=device)
                for bias in (None, x.new_zeros(rows)):
                    self.apply(x, list(prepared.tensors.values()), bias, rows, list(prepared.meta))
