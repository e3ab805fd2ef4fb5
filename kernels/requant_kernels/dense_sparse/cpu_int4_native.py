"""The packed 4-bit layer on a CPU without Python between its parts, where there is a C++ compiler."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

from requant_kernels import native
from requant_kernels.dense_sparse import cpu_int4
from requant_kernels.dense_sparse.int4_panels import panel_rows
from requant_kernels.dense_sparse.interface import LayerConfig
from requant_kernels.prepared import Prepared
from requant_kernels.weight import DenseSparseWeight

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

    def prepare(self, weight: DenseSparseWeight, config: LayerConfig) -> Prepared:
        """As CpuInt4's, but for the sparse part: by units of half a panel, h rows, unit_offsets int32 [N'/h + 1];
        places int32 (column * h + row in its unit) and values fp32, each [nnz]."""
        prepared, half = super().prepare(weight, config), panel_rows() // 2
        tensors = prepared.tensors
        if "sparse_rows" in tensors:
            places = tensors["sparse_columns"] * half + tensors["sparse_rows"] % half
            tensors = {
                "weight_packed": tensors["weight_packed"],
                "scale_and_zero": tensors["scale_and_zero"],
                "sparse_unit_offsets": tensors["sparse_row_offsets"][::half].contiguous(),
                "sparse_places": places,
                "sparse_values": tensors["sparse_values"],
            }
        return replace(prepared, tensors=tensors)

    def apply(
        self,
        x: torch.Tensor,
        tensors: list[torch.Tensor],
        bias: torch.Tensor | None,
        out_features: int,
        meta: list[int],
    ) -> torch.Tensor:
        return torch.ops.requant.cpu_int4_linear.default(x, tensors, bias, out_features, *meta)


@cache
def unavailable() -> str:
    """Why the operator can not be had on this machine; empty where it is there."""
    if panel_rows() not in PANELS:
        return f"PyTorch {torch.__version__} packs 4-bit weights in a layout that is not known here"
    missing = native.load(SOURCE)
    if not missing:
        torch.library.register_fake("requant::cpu_int4_linear", _fake)
    return missing


def _fake(
    x: torch.Tensor, weights: list[torch.Tensor], bias: torch.Tensor | None, out_features: int, *_: int
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], out_features)
