"""2-, 3- and 4-bit weights on a CPU: PyTorch's packed 4-bit product for few tokens, blockwise decoding for many.

Both regimes read one packed copy of the weights. Codes of 2 and 3 bits move into the 4-bit grid: they take 4 bits of
memory, but decode to the same numbers.
"""

from math import gcd

import torch

from requant_kernels.dense_sparse.cpu_packed import refused
from requant_kernels.dense_sparse.cpu_sparse import add_sparse
from requant_kernels.dense_sparse.int4_panels import (
    GROUP_SIZES,
    ROW_MULTIPLE,
    ZERO_CODE,
    multiply_panels,
    pack_panels,
    panel_rows,
    unavailable,
    unpack_panels,
)
from requant_kernels.dense_sparse.interface import Implementation, LayerConfig
from requant_kernels.prepared import Prepared
from requant_kernels.sparse import SparsePart
from requant_kernels.weight import DenseSparseWeight

# From here on decoding is amortised: measured on AVX-512 without bf16 arithmetic.
MANY_TOKENS = 64
# Numbers in the decoded block: 2 MiB of fp32, which stays in the second-level cache.
BLOCK_ELEMENTS = 1 << 19


class CpuInt4(Implementation):
    """bf16 activations; weight [N, K] as 4-bit panels, beside it the sparse part by rows."""

    name = "cpu_int4"

    def can_implement(self, config: LayerConfig) -> tuple[bool, str]:
        missing = refused(config) or unavailable()
        return not missing, missing

    def prepare(self, weight: DenseSparseWeight, config: LayerConfig) -> Prepared:
        """weight_packed uint8 [N', K/2] and scale_and_zero bf16 [K/g, N', 2], N' = N padded to 64; of the sparse
        part row_offsets int32 [N'+1]; rows, columns int32 and values fp32, each [nnz]."""
        rows, group = weight.out_features, _kernel_group(weight.group_size)
        padding = -rows % ROW_MULTIPLE
        codes, scale, zero = _in_4_bit_grid(weight)
        scale_and_zero = torch.stack((scale, zero), -1).repeat_interleave(weight.group_size // group, 1)
        tensors = {
            "weight_packed": pack_panels(torch.nn.functional.pad(codes, (0, 0, 0, padding))),
            "scale_and_zero": torch.nn.functional.pad(scale_and_zero, (0, 0, 0, 0, 0, padding))
            .transpose(0, 1)
            .to(torch.bfloat16)
            .contiguous(),
        }
        if weight.sparse is not None and weight.sparse.nnz:
            offsets = weight.sparse.row_offsets
            padded = torch.cat((offsets, offsets[-1:].expand(padding)))
            tensors |= self._sparse_tensors(weight.sparse, padded) | {"sparse_values": weight.sparse.values.float()}
        return Prepared(self.name, rows, tensors, meta=(group, panel_rows()))

    def _sparse_tensors(self, sparse: SparsePart, row_offsets: torch.Tensor) -> dict[str, torch.Tensor]:
        """Where the values of ``sparse`` belong; row_offsets: int32 [N'+1]."""
        return {
            "sparse_row_offsets": row_offsets,
            "sparse_rows": sparse.rows().to(torch.int32),
            "sparse_columns": sparse.columns.to(torch.int32),
        }

    def apply(
        self,
        x: torch.Tensor,
        tensors: list[torch.Tensor],
        bias: torch.Tensor | None,
        out_features: int,
        meta: list[int],
    ) -> torch.Tensor:
        group, panel = meta
        if panel and x.shape[0] >= MANY_TOKENS:
            y = _decode_and_multiply(x, tensors, group, panel)
        else:
            y = _multiply_packed(x, tensors, group)
        if y.shape[1] != out_features:
            y = y[:, :out_features].contiguous()
        if bias is not None:
            y += bias
        return y


def _kernel_group(group_size: int) -> int:
    """The largest group of the operator's that tiles ``group_size`` columns."""
    return gcd(group_size, max(GROUP_SIZES))


def _in_4_bit_grid(weight: DenseSparseWeight) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes uint8 [N, K], scale fp32 [N, K/g], zero fp32 [N, K/g] of (code - 8) * scale + zero.

    Exact, except that the zero of asymmetric 4-bit weights is later rounded to bf16: an error below 2**-9 of itself.
    """
    assert weight.scale is not None
    codes, scale = weight.codes(), weight.scale.float()
    zero_points = weight.zero_points()
    if zero_points is None:
        return codes + (ZERO_CODE - weight.scheme.weights.midpoint), scale, torch.zeros_like(scale)
    if weight.scheme.weights.bits < 4:  # code - zero_point itself fits into 4 bits: no zero term
        shift = (ZERO_CODE - zero_points).repeat_interleave(weight.group_size, 1)
        return codes + shift, scale, torch.zeros_like(scale)
    return codes, scale, (ZERO_CODE - zero_points.float()) * scale


def _multiply_packed(x: torch.Tensor, tensors: list[torch.Tensor], group: int) -> torch.Tensor:
    y = multiply_panels(x, tensors[0], group, tensors[1])
    if len(tensors) > 2:
        _, _, row_offsets, _, columns, values = tensors
        add_sparse(y, x, row_offsets, columns, values)
    return y


def _decode_and_multiply(x: torch.Tensor, tensors: list[torch.Tensor], group: int, panel: int) -> torch.Tensor:
    """Decodes as many panels at a time as the cache holds, adds their sparse entries, multiplies in fp32."""
    packed, scale_and_zero, *by_rows = tensors
    columns, panels = x.shape[1], packed.view(-1, x.shape[1], panel // 2)
    step = max(1, BLOCK_ELEMENTS // (columns * panel))
    bounds = [*by_rows[0][:: step * panel].tolist(), None] if by_rows else []
    x32 = x.float()
    y = x.new_empty(x.shape[0], packed.shape[0])
    workspace = x32.new_empty(columns * step * panel)
    for index, first in enumerate(range(0, len(panels), step)):
        block = panels[first : first + step]
        start, stop = first * panel, (first + len(block)) * panel
        decoded = workspace[: columns * (stop - start)].view(columns, -1)
        unpack_panels(block, decoded)
        scale, zero = scale_and_zero[:, None, start:stop].float().unbind(-1)
        grouped = decoded.view(-1, group, stop - start)
        torch.addcmul(zero - ZERO_CODE * scale, grouped, scale, out=grouped)
        if by_rows:
            _add_entries(decoded, by_rows[1:], start, slice(*bounds[index : index + 2]))
        y[:, start:stop] = torch.mm(x32, decoded)
    return y


def _add_entries(decoded: torch.Tensor, sparse: list[torch.Tensor], start: int, entries: slice) -> None:
    """The sparse ``entries``, those of the rows from ``start`` on, added into the transposed block [K, n]."""
    rows, columns, values = (part[entries] for part in sparse)
    decoded.view(-1).index_add_(0, columns * decoded.shape[1] + (rows - start), values)
