"""2-, 3- and 4-bit weights, each in its own bits, on a CPU that multiplies bfloat16 and has a C++ compiler."""

from pathlib import Path

import torch
from torch.nn.functional import pad

from requant_kernels import native
from requant_kernels.dense_sparse.cpu_packed import refused
from requant_kernels.dense_sparse.interface import Implementation, LayerConfig
from requant_kernels.dense_sparse.planes import PLANES, pack_planes
from requant_kernels.prepared import Prepared
from requant_kernels.sparse import SparsePart
from requant_kernels.weight import DenseSparseWeight

SOURCE = Path(__file__).with_name("cpu_bf16.cpp")
STRIP = 16  # rows whose codes stand beside each other
PANEL = 64  # rows whose sparse entries do


class CpuBf16(Implementation):
    """bf16 activations; weight [N, K] in strips of rows, beside it the sparse part by panels."""

    name = "cpu_bf16"
    traceable = True

    def can_implement(self, config: LayerConfig) -> tuple[bool, str]:
        missing = refused(config) or unavailable()
        return not missing, missing

    def prepare(self, weight: DenseSparseWeight, config: LayerConfig) -> Prepared:
        """weight_packed int32 [N'/16, K*b/32, 16] and scale_and_zero bf16 [K/g, N', 2], N' = N padded to 64, zero the
        zero point less half of all codes; of the sparse part panel_offsets int32 [N'/64 + 1], places int32 and values
        bf16, each [nnz]."""
        assert weight.scale is not None
        bits, rows = weight.scheme.weights.bits, weight.out_features
        padding = -rows % PANEL
        zero_points = weight.zero_points()
        zero = torch.zeros_like(weight.scale) if zero_points is None else zero_points.float() - (1 << (bits - 1))
        steps = torch.stack((weight.scale.float(), zero.float()), -1).to(torch.bfloat16)
        tensors = {
            "weight_packed": pack_strips(pad(weight.codes(), (0, 0, 0, padding)), bits),
            "scale_and_zero": pad(steps, (0, 0, 0, 0, 0, padding)).transpose(0, 1).contiguous(),
        }
        if weight.sparse is not None and weight.sparse.nnz:
            tensors |= _sparse_tensors(weight.sparse)
        return Prepared(self.name, rows, tensors, meta=(bits, weight.group_size))

    def apply(
        self,
        x: torch.Tensor,
        tensors: list[torch.Tensor],
        bias: torch.Tensor | None,
        out_features: int,
        meta: list[int],
    ) -> torch.Tensor:
        return torch.ops.requant.cpu_bf16_linear.default(x, tensors, bias, out_features, *meta)


def pack_strips(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes uint8 [N, K], N a multiple of 16, K of 32 -> int32 [N/16, K*bits/32, 16], as cpu_bf16.cpp says."""
    pairs = codes.contiguous().view(torch.int16).view(len(codes) // STRIP, STRIP, -1, PLANES)
    words = pack_planes(pairs.permute(3, 0, 1, 2).contiguous(), bits)  # [bits, strips, rows, K/32]
    return words.permute(1, 3, 0, 2).flatten(1, 2).contiguous()


def _sparse_tensors(sparse: SparsePart) -> dict[str, torch.Tensor]:
    """Panel after panel, by column and then by row: where each value belongs."""
    rows, offsets, panel = sparse.rows(), sparse.row_offsets, sparse.in_features * PANEL
    places, order = torch.sort(rows // PANEL * panel + sparse.columns.long() * PANEL + rows % PANEL)
    return {
        "sparse_panel_offsets": torch.cat((offsets[:-1:PANEL], offsets[-1:])),
        "sparse_places": (places % panel).to(torch.int32),
        "sparse_values": sparse.values[order],
    }


def unavailable() -> str:
    """Why the operator can not be had on this machine; empty where it is there."""
    if not torch.cpu._is_avx512_bf16_supported():
        return "needs a processor with AVX-512 BF16"
    return native.load_linear(SOURCE, "requant::cpu_bf16_linear")
