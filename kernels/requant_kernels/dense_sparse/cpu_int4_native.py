"""The packed 4-bit layer on a CPU without Python between its parts, where there is a C++ compiler."""

from pathlib import Path

import torch

from requant_kernels import native
from requant_kernels.dense_sparse import cpu_int4
from requant_kernels.dense_sparse.int4_panels import panel_rows
from requant_kernels.dense_sparse.interface import LayerConfig
from requant_kernels.sparse import SparsePart

SOURCE = Path(__file__).with_name("cpu_int4.cpp")
PANELS = (64, 32)  # that it is written for


class CpuInt4Native(cpu_int4.CpuInt4):
    """The layout of CpuInt4 in one operator and one pass over the weights, for any number of tokens."""

    name = "cpu_int4_native"
    traceable = True

    def can_implement(self, config: LayerConfig) -> tuple[bool, str]:
        able, reason = super().can_implement(config)
        if not able:
            return False, reason
        missing = unavailable()
        return not missing, missing

    def _sparse_tensors(self, sparse: SparsePart, row_offsets: torch.Tensor) -> dict[str, torch.Tensor]:
        """By units of half a panel, h rows: unit offsets int32 [N'/h + 1]; places int32 [nnz], column * h + row in its
        unit."""
        half = panel_rows() // 2
        return {
            "sparse_unit_offsets": row_offsets[::half].contiguous(),
            "sparse_places": sparse.columns.to(torch.int32) * half + sparse.rows().to(torch.int32) % half,
        }

    def apply(
        self,
        x: torch.Tensor,
        tensors: list[torch.Tensor],
        bias: torch.Tensor | None,
        out_features: int,
        meta: list[int],
    ) -> torch.Tensor:
        return torch.ops.requant.cpu_int4_linear.default(x, tensors, bias, out_features, *meta)


def unavailable() -> str:
    """Why the operator can not be had on this machine; empty where it is there."""
    if panel_rows() not in PANELS:
        return f"PyTorch {torch.__version__} packs 4-bit weights in a layout that is not known here"
    return native.load_linear(SOURCE, "requant::cpu_int4_linear")
