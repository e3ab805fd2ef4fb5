"""The Triton kernels as an implementation that dispatch can choose. Importing this needs no GPU and no triton."""

from collections.abc import Collection

import torch

from requant_kernels import gpu
from requant_kernels.prepared import Prepared
from requant_kernels.w8a8.interface import Implementation, LayerConfig
from requant_kernels.w8a8.runtime import Runtime
from requant_kernels.w8a8.triton.table import COUNTERS, Table, table_of
from requant_kernels.w8a8.weight import W8A8Weight


class Triton(Implementation):
    """Every W8A8 scheme on CUDA devices from compute capability 8.0 on.

    ``table`` overrides the launch configurations that belong to the device; ``launch`` decides what runs.
    """

    name = "triton"
    readable = True

    def __init__(self, table: Table | None = None) -> None:
        self._table = table
        self._warm_up = gpu.WarmUp()

    def can_implement(self, config: LayerConfig) -> tuple[bool, str]:
        return gpu.able(config.device)

    def prepare(self, weight: W8A8Weight, config: LayerConfig) -> Prepared:
        """weight: the codes int8 [N, K] as they are stored."""
        there = weight.to(config.device)
        tensors, meta = Runtime.of(there, there.codes.contiguous(), there.scale.float()).store()
        tensors["arrived"] = torch.zeros(COUNTERS, dtype=torch.int32, device=config.device)
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

        *kept, arrived = tensors
        return run(gpu.aligned(x), Runtime.load(kept, meta), arrived, bias, self._table_of(x.device))

    def _table_of(self, device: torch.device) -> Table:
        return self._table or table_of(device)

    def warm_up(
        self, prepared: Prepared, dtype: torch.dtype, device: torch.device, *, limit: int, biased: Collection[bool]
    ) -> None:
        rows, columns = prepared.tensors["weight"].shape
        regimes = self._table_of(device).regimes(rows, columns)
        like = torch.empty(0, dtype=dtype, device=device)
        self._warm_up.run(self, prepared, columns, regimes=regimes, like=like, limit=limit, biased=biased)
