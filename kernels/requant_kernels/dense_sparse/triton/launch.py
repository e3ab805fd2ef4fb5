"""From a laid-out layer and a batch of tokens to kernel launches. Imports triton, so only calls import it."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton

from requant_kernels.dense_sparse.triton.few import few_kernel
from requant_kernels.dense_sparse.triton.fixup import reduce_kernel, transpose_kernel
from requant_kernels.dense_sparse.triton.layer import CODEBOOK, HERE, LATER, WHOLE, Layer
from requant_kernels.dense_sparse.triton.many import decode_kernel
from requant_kernels.dense_sparse.triton.middle import middle_kernel
from requant_kernels.dense_sparse.triton.strips import BLOCK, STRIP
from requant_kernels.dense_sparse.triton.table import Decode, Table, Tile, evenly, shared_out, widened
from requant_kernels.gpu import FP_FUSION

MAX_SPLITS = 16
REDUCE_COLUMNS = 128
QUADS = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8)  # how it hands out operands: operand.py
TRANSPOSE_COLUMNS = 64
# Of every launch but that of decode_kernel, which the vendor's library follows; by Table.pdl.
OPTIONS = {False: {"PDL": False, **FP_FUSION}, True: {"PDL": True, "launch_pdl": True, **FP_FUSION}}
EXPONENTS = {torch.bfloat16: 0x3F803F80, torch.float16: 0x64006400}  # of 1 and of 1024, in both halves of a word


@dataclass(frozen=True)
class Routing:
    """Which rows of x go to which expert (routing.py).

    pairs int32 [blocks, tokens]: of tokens and experts, ``count`` where there is none; row p of y is row p // top of x
    times its expert. chosen int32 [blocks]: the expert of a block, negative where it is not used. tile: runs a block.
    """

    tile: Tile
    pairs: torch.Tensor
    chosen: torch.Tensor
    count: int
    top: int
    experts: int

    @property
    def each(self) -> int:
        """Tokens of an expert, were they shared out evenly."""
        return evenly(self.count, self.experts)


@dataclass(frozen=True)
class Call:
    """One application of a layer: x [M, K] contiguous and 16-byte aligned, tensors as ``layer.build`` names them. With
    ``routing`` the layer is a stack of experts of ``out_features`` rows each."""

    layer: Layer
    x: torch.Tensor
    tensors: list[torch.Tensor]
    bias: torch.Tensor | None
    out_features: int
    routing: Routing | None = None

    @property
    def tokens(self) -> int:
        """Rows of y."""
        return self.routing.count if self.routing else self.x.shape[0]

    def token_tiles(self, tile: Tile) -> int:
        return len(self.routing.chosen) if self.routing else -(-self.tokens // tile.tokens)

    @property
    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.tensors[0], self.tensors[1]

    @property
    def arrived(self) -> torch.Tensor:
        """[tiles of rows and tokens whose columns may be split], all zero."""
        return self.tensors[2]

    @property
    def slots(self) -> list[torch.Tensor]:
        """slots [strips and more, depth, 32], further, owners, rows, windows; stand-ins that no kernel reads where
        there are none; so with what follows."""
        return self.tensors[3:8] if self.layer.steps else [self.tensors[0]] * 5

    @property
    def beside_slots(self) -> list[torch.Tensor]:
        """entries, segments, strip_chunks, bounds, overflow."""
        first = 8 if self.layer.steps else 3
        return self.tensors[first : first + 5] if self.layer.beside_slots.entries else [self.tensors[0]] * 5

    @property
    def beside_windows(self) -> list[torch.Tensor]:
        """columns, words, offsets, overflow."""
        return self.tensors[-4:] if self.layer.beside_windows.entries else [self.tensors[0]] * 4

    @property
    def exponent(self) -> int:
        """What decode.py puts above a code: the kernels' argument of that name."""
        return EXPONENTS[self.x.dtype]

    @property
    def constants(self) -> dict[str, Any]:
        return {"BITS": self.layer.bits, "GROUP": self.layer.group, "KIND": self.layer.kind}

    @property
    def sparse_constants(self) -> dict[str, bool]:
        """Of kernels that read slots, and the lists beside them."""
        return {"SLOTS": bool(self.layer.steps), "LISTS": bool(self.layer.beside_slots.entries)}


def most_steps(tile: Tile) -> int:
    """How many steps of the slots may go with a block of columns: as many as there are registers for."""
    return 2 if tile.tokens <= 8 else 1


def paired(group: int, even: bool, transposed: bool, routed: bool) -> bool:
    """Whether the launch that transposes x also pairs its columns (operand.py): where Triton hands them out in fours,
    which it does not of steps as narrow as a plane, and rows are whole blocks, of linear layers."""
    return QUADS and group > STRIP and even and transposed and not routed


@cache
def column_splits(steps: int, tiles: int, programs: int) -> int:
    """Programs among which the columns, in ``steps``, are split so that about ``programs`` run on ``tiles`` of rows and
    tokens; none of them is idle."""
    share = -(-steps // max(1, min(programs // tiles, steps, MAX_SPLITS)))
    return -(-steps // share)


Grid = tuple[int, int, int]  # tiles of tokens, tiles of rows, splits of the columns


def _row_tiles(layer: Layer, tile: Tile, experts: int) -> int:
    beside = layer.beside_slots if tile.kernel == "few" else layer.beside_windows
    return beside.lists // tile.strips // experts


def fitted(layer: Layer, tile: Tile, token_tiles: int, experts: int = 1) -> Tile:
    """How the table's tile runs on a layer, or on ``experts`` that are stacked to one."""
    return widened(tile, _row_tiles(layer, tile, experts) * token_tiles, layer.blocks)


def grid_of(layer: Layer, tile: Tile, token_tiles: int, experts: int = 1) -> Grid:
    """Of a layer, or of ``experts`` that are stacked to one."""
    row_tiles = _row_tiles(layer, tile, experts)
    tiles = row_tiles * token_tiles
    splits = column_splits(-(-layer.blocks // tile.k_warps), tiles, tile.programs) if tiles <= layer.counters else 1
    return token_tiles, row_tiles, splits


@dataclass(frozen=True)
class Sums:
    """What becomes of the sums (finish.py): ``out`` [M, N] of x's dtype, and fp32 ``shares``, which is ``out`` again
    where ``split`` is WHOLE."""

    split: int
    out: torch.Tensor
    shares: torch.Tensor


def run(call: Call, table: Table) -> torch.Tensor:
    """y [M, N] of x's dtype."""
    layer = call.layer
    options = OPTIONS[table.pdl]
    routing = call.routing
    tile = routing.tile if routing else table.tile(call.tokens, layer.bits, layer.kind == CODEBOOK)
    if tile is None:
        return _decode_and_multiply(call, table.decode)
    few = tile.kernel == "few"
    tile = fitted(layer, tile, call.token_tiles(tile), routing.experts if routing else 1)
    grid = grid_of(layer, tile, call.token_tiles(tile), routing.experts if routing else 1)
    token_tiles, row_tiles, splits = grid
    beside, lists = (layer.beside_slots, call.beside_slots) if few else (layer.beside_windows, call.beside_windows)
    split = LATER if beside.overflow else HERE if splits > 1 else WHOLE
    out = call.x.new_empty(call.tokens, call.out_features)
    shares = out
    if split != WHOLE:
        shares = call.x.new_empty(splits, token_tiles * row_tiles, 16 * tile.strips * tile.tokens, dtype=torch.float32)
    sums = Sums(split, out, shares)
    (_few if few else _middle)(call, tile, grid, sums, options)
    if split == LATER:
        _reduce(call, tile, grid, sums, lists[-1], options)
    return out


def _shared(call: Call, tile: Tile, sums: Sums) -> tuple[list[torch.Tensor], tuple[int, ...], dict[str, Any]]:
    """What both matrix kernels take: arrays from the output to the dense part, sizes, constants."""
    layer = call.layer
    bias = call.bias if sums.split != LATER else None
    arrays = [sums.out, sums.shares, call.arrived, call.x if bias is None else bias, *call.dense]
    sizes = (
        call.tokens,
        call.out_features,
        layer.in_features,
        layer.blocks,
        layer.strips,
        layer.rows,
        layer.scale_step,
        call.exponent,
        call.slots[0].shape[1],
    )
    constants = {"SPLIT": sums.split, "BIAS": bias is not None, "TOKENS": tile.tokens, "S": tile.strips}
    constants |= {"num_warps": tile.warps, "num_stages": tile.stages, **call.constants}
    return arrays, sizes, constants


def _few(call: Call, tile: Tile, grid: Grid, sums: Sums, options: dict[str, Any]) -> None:
    entries, segments, _, bounds, _ = call.beside_slots
    arrays, sizes, constants = _shared(call, tile, sums)
    slots, further, owners, _, _ = call.slots
    q = max(1, min(call.layer.steps, most_steps(tile)))
    rest = call.layer.steps > q or bool(call.layer.deepened)
    layer = call.layer
    routing = call.routing
    constants["TRANSPOSED"] = layer.sparse and tile.transposed(routing.each if routing else call.tokens)
    constants |= {"KW": tile.k_warps, "Q": q, "REST": rest, "QUADS": QUADS, **call.sparse_constants}
    constants["EVEN"] = layer.in_features % (BLOCK * tile.k_warps) == 0
    constants["PAIRED"] = paired(layer.group, constants["EVEN"], constants["TRANSPOSED"], routing is not None)
    x, xt = call.x, call.x
    if constants["TRANSPOSED"]:
        xt, in_pairs = _transposed(call, tile, options, in_pairs=constants["PAIRED"])
        x = in_pairs if constants["PAIRED"] else x
    arrays += [slots, owners, further, entries, segments, bounds, *_route(call, constants)]
    token_tiles, row_tiles, splits = grid
    few_kernel[row_tiles, splits, token_tiles](x, xt, *arrays, *sizes, **constants, **options)


def _route(call: Call, constants: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """pairs and experts, or stand-ins; whether there are any is added to ``constants``."""
    routing = call.routing
    constants["TOP"] = routing.top if routing else 0
    return (routing.pairs, routing.chosen) if routing else call.dense


def _middle(call: Call, tile: Tile, grid: Grid, sums: Sums, options: dict[str, Any]) -> None:
    layer = call.layer
    arrays, sizes, constants = _shared(call, tile, sums)
    constants |= {"WINDOW": layer.window, "LISTS": bool(layer.beside_windows.entries)}
    constants["COLUMNS"] = tile.columns
    constants["EVEN"] = layer.in_features % BLOCK == 0
    constants["TRANSPOSED"] = layer.transposed(tile.tokens)
    slots, further, _, rows, windows = call.slots
    arrays += [slots, rows, further, windows, *call.beside_windows[:3], *_route(call, constants)]
    xt = _transposed(call, tile, options)[0] if constants["TRANSPOSED"] else call.x
    middle_kernel[grid](call.x, xt, *arrays, *sizes, **constants, **options)


def _transposed(
    call: Call, tile: Tile, options: dict[str, Any], *, in_pairs: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """x^T [tiles, K, tokens] of each tile of tokens, and, if wanted, x as operand.py wants it."""
    constants: dict[str, Any] = {
        "TOKENS": tile.tokens,
        "COLUMNS": TRANSPOSE_COLUMNS,
        "num_warps": 4,
        "PAIRED": in_pairs,
    }
    route = _route(call, constants)
    tiles, columns = call.token_tiles(tile), call.x.shape[1]
    xt = call.x.new_empty(tiles, columns, tile.tokens)
    pairs = torch.empty_like(xt) if in_pairs else xt
    grid = (-(-columns // TRANSPOSE_COLUMNS), tiles)
    transpose_kernel[grid](call.x, xt, pairs, *route, call.tokens, columns, **constants, **options)
    return xt, pairs


def _reduce(  # noqa: PLR0917
    call: Call, tile: Tile, grid: Grid, sums: Sums, overflow: torch.Tensor, options: dict[str, Any]
) -> None:
    _, row_tiles, splits = grid
    reduce_kernel[(-(-call.out_features // REDUCE_COLUMNS), call.tokens)](
        sums.shares,
        sums.out,
        call.x if call.bias is None else call.bias,
        overflow,
        call.tokens,
        call.out_features,
        call.layer.strips,
        splits,
        row_tiles,
        BIAS=call.bias is not None,
        SPLITS=triton.next_power_of_2(splits),
        COLUMNS=REDUCE_COLUMNS,
        R=16 * tile.strips,
        TOKENS=tile.tokens,
        num_warps=4,
        **options,
    )


def _decode_and_multiply(call: Call, decode: Decode) -> torch.Tensor:
    layer, n = call.layer, call.out_features
    step = decode.slice_rows(layer.rows, layer.in_features)
    decode = shared_out(decode, layer.blocks)
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
    slots, further, owners, _, _ = call.slots
    entries, segments, chunks, *_ = call.beside_slots
    decode_kernel[(-(-rows // (16 * decode.strips)),)](
        weight,
        codes,
        scales,
        slots,
        owners,
        further,
        entries,
        segments,
        chunks,
        start // 16,
        layer.strips,
        rows,
        layer.in_features,
        layer.blocks,
        layer.rows,
        layer.scale_step,
        call.exponent,
        call.slots[0].shape[1],
        **call.constants,
        **call.sparse_constants,
        S=decode.strips,
        KW=decode.k_warps,
        num_warps=decode.warps,
        num_stages=decode.stages,
        **FP_FUSION,
    )
