"""From a laid-out layer and a batch of tokens to kernel launches. Imports triton, so only calls import it."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton

from requant_kernels.dense_sparse.triton.few import few_kernel
from requant_kernels.dense_sparse.triton.fixup import reduce_kernel, transpose_kernel
from requant_kernels.dense_sparse.triton.layer import CODEBOOK, Layer
from requant_kernels.dense_sparse.triton.many import decode_kernel
from requant_kernels.dense_sparse.triton.middle import middle_kernel
from requant_kernels.dense_sparse.triton.table import Decode, Table, Tile
from requant_kernels.gpu import FP_FUSION

MAX_SPLITS = 16
REDUCE_COLUMNS = 128
QUADS = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8)  # how it hands out operands: decode.quads
TRANSPOSE_COLUMNS = 64
# Of every launch but that of decode_kernel, which the vendor's library follows; by Table.pdl.
OPTIONS = {False: {"PDL": False, **FP_FUSION}, True: {"PDL": True, "launch_pdl": True, **FP_FUSION}}
EXPONENTS = {torch.bfloat16: 0x3F803F80, torch.float16: 0x64006400}  # of 1 and of 1024, in both halves of a word


@dataclass(frozen=True)
class Call:
    """One application of a layer: x [M, K] contiguous and 16-byte aligned, tensors as ``layer.build`` names them."""

    layer: Layer
    x: torch.Tensor
    tensors: list[torch.Tensor]
    bias: torch.Tensor | None
    out_features: int

    @property
    def tokens(self) -> int:
        return self.x.shape[0]

    @property
    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.tensors[0], self.tensors[1]

    @property
    def slots(self) -> torch.Tensor:
        """[strips, depth, 32]; a stand-in that no kernel reads where there are none; so with ``lists``."""
        return self.tensors[2] if self.layer.steps else self.tensors[0]

    @property
    def lists(self) -> list[torch.Tensor]:
        """entries, segments, strip_chunks, bounds, overflow."""
        return self.tensors[-5:] if self.layer.tail else [self.tensors[0]] * 5

    @property
    def exponent(self) -> int:
        """What decode.py puts above a code: the kernels' argument of that name."""
        return EXPONENTS[self.x.dtype]

    def constants(self) -> dict[str, Any]:
        layer = self.layer
        return {"BITS": layer.bits, "GROUP": layer.group, "KIND": layer.kind} | {
            "SLOTS": bool(layer.steps),
            "LISTS": bool(layer.tail),
        }

    def steps(self, most: int) -> tuple[int, bool]:
        """How many steps of the slots go with each block of columns, at most ``most``, and whether some are left."""
        return max(1, min(self.layer.steps, most)), self.layer.steps > most


def most_steps(tile: Tile) -> int:
    """How many steps of the slots may go with a block of columns: as many as there are registers for."""
    return 2 if tile.kernel == "few" and tile.tokens <= 8 else 1


@cache
def column_splits(layer: Layer, tile: Tile, token_tiles: int) -> int:
    """Programs among which the columns are split so that about ``tile.programs`` run; none of them is idle."""
    wanted = tile.programs // (layer.lists // tile.strips * token_tiles)
    steps = -(-layer.blocks // tile.k_warps)
    share = -(-steps // max(1, min(wanted, steps, MAX_SPLITS)))
    return -(-steps // share)


def run(call: Call, table: Table) -> torch.Tensor:
    """y [M, N] of x's dtype."""
    layer = call.layer
    options = OPTIONS[table.pdl]
    tile = table.tile(call.tokens, layer.bits, layer.kind == CODEBOOK)
    if tile is None:
        return _decode_and_multiply(call, table.decode)
    token_tiles = -(-call.tokens // tile.tokens)
    splits = column_splits(layer, tile, token_tiles)
    if splits == 1 and not layer.overflow:
        out = call.x.new_empty(call.tokens, call.out_features)
        _launch(call, tile, token_tiles, splits, out, partial=False, options=options)
        return out
    shares = call.x.new_empty(splits, call.tokens, 16 * layer.lists, dtype=torch.float32)
    _launch(call, tile, token_tiles, splits, shares, partial=True, options=options)
    return _reduce(call, shares, options)


def _launch(
    call: Call, tile: Tile, token_tiles: int, splits: int, out: torch.Tensor, *, partial: bool, options: dict[str, Any]
) -> None:
    layer = call.layer
    codes, scales = call.dense
    entries, segments, _, bounds, _ = call.lists
    row_tiles = layer.lists // tile.strips
    bias = None if partial else call.bias
    sizes = (
        call.tokens,
        call.out_features,
        layer.in_features,
        layer.blocks,
        layer.strips,
        layer.rows,
        layer.scale_step,
        call.exponent,
        call.slots.shape[1],
    )
    q, rest = call.steps(most_steps(tile))
    more = {"REST": rest, "PARTIAL": partial, "BIAS": bias is not None, "TOKENS": tile.tokens, "S": tile.strips}
    more |= {"num_warps": tile.warps, "num_stages": tile.stages, **call.constants(), **options}
    stride = token_tiles * tile.tokens
    xt = _transpose(call.x, stride, tile.tokens, options) if layer.sparse and tile.transposed else call.x
    arrays = (xt, out, call.x if bias is None else bias, codes, scales, call.slots, entries, segments, bounds)
    if tile.kernel == "few":
        few_kernel[(row_tiles, splits)](call.x, *arrays, *sizes, KW=tile.k_warps, Q=q, QUADS=QUADS, **more)
    else:
        middle_kernel[(token_tiles, row_tiles, splits)](call.x, *arrays, *sizes, stride, **more)


def _transpose(x: torch.Tensor, stride: int, tokens: int, options: dict[str, Any]) -> torch.Tensor:
    xt = x.new_empty(x.shape[1], stride)
    grid = (stride // tokens, -(-x.shape[1] // TRANSPOSE_COLUMNS))
    sizes = (*x.shape, stride)
    transpose_kernel[grid](x, xt, *sizes, TOKENS=tokens, COLUMNS=TRANSPOSE_COLUMNS, num_warps=4, **options)
    return xt


def _reduce(call: Call, shares: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    layer, splits = call.layer, shares.shape[0]
    out = call.x.new_empty(call.tokens, call.out_features)
    reduce_kernel[(-(-call.out_features // REDUCE_COLUMNS), call.tokens)](
        shares,
        out,
        call.x if call.bias is None else call.bias,
        call.lists[4],
        call.tokens,
        call.out_features,
        layer.strips,
        layer.lists,
        splits,
        BIAS=call.bias is not None,
        OVERFLOW=bool(layer.overflow),
        SPLITS=triton.next_power_of_2(splits),
        COLUMNS=REDUCE_COLUMNS,
        num_warps=4,
        **options,
    )
    return out


def _decode_and_multiply(call: Call, decode: Decode) -> torch.Tensor:
    layer, n = call.layer, call.out_features
    step = decode.slice_rows(layer.rows, layer.in_features)
    workspace = call.x.new_empty(min(step, n), layer.in_features)
    out = call.x.new_empty(call.tokens, n)
    for start in range(0, n, step):
        stop = min(start + step, n)
        weight = workspace[: stop - start]
        _decode(call, decode, weight, start)
        if call.bias is None:
            torch.mm(call.x, weight.T, out=out[:, start:stop])
        else:
            torch.addmm(call.bias[start:stop], call.x, weight.T, out=out[:, start:stop])
    return out


def _decode(call: Call, decode: Decode, weight: torch.Tensor, start: int) -> None:
    layer, rows = call.layer, weight.shape[0]
    codes, scales = call.dense
    entries, segments, chunks, *_ = call.lists
    decode_kernel[(-(-rows // (16 * decode.strips)),)](
        weight,
        codes,
        scales,
        call.slots,
        entries,
        segments,
        chunks,
        start // 16,
        rows,
        layer.in_features,
        layer.blocks,
        layer.rows,
        layer.scale_step,
        call.exponent,
        call.slots.shape[1],
        **call.constants(),
        S=decode.strips,
        KW=decode.k_warps,
        num_warps=decode.warps,
        num_stages=decode.stages,
        **FP_FUSION,
    )
