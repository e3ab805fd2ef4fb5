"""From a laid-out layer and a batch of tokens to kernel launches. Imports triton, so only calls import it."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton

from requant_kernels.dense_sparse.triton import declared
from requant_kernels.dense_sparse.triton.fixup import reduce_kernel
from requant_kernels.dense_sparse.triton.layer import CODEBOOK, HERE, LATER, MOST_REST, WHOLE, Layer
from requant_kernels.dense_sparse.triton.many import decode_kernel
from requant_kernels.dense_sparse.triton.middle import middle_kernel
from requant_kernels.dense_sparse.triton.one import one_kernel
from requant_kernels.dense_sparse.triton.strips import BLOCK
from requant_kernels.dense_sparse.triton.table import Decode, Table, Tile, narrowed, shared_out, widened
from requant_kernels.gpu import FP_FUSION

MAX_SPLITS = 16
REDUCE_COLUMNS = 128
PTX = not triton.knobs.runtime.interpret and torch.version.hip is None  # of our own within the kernels
TRITON = tuple(map(int, triton.__version__.split(".")[:2]))
if PTX:
    declared.always_ask()
# Of every launch but that of decode_kernel, which the vendor's library follows; by Table.pdl.
OPTIONS = {False: {"PDL": False, **FP_FUSION}, True: {"PDL": True, "launch_pdl": True, **FP_FUSION}}


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
    def patches(self) -> list[torch.Tensor]:
        """entries, starts; stand-ins that no kernel reads where there are none; so with what follows."""
        return self.tensors[3:5] if self.layer.rounds else [self.tensors[0]] * 2

    @property
    def slots(self) -> list[torch.Tensor]:
        """slots [strips and more, depth, 32], further, owners."""
        return self.tensors[5:8] if self.layer.steps else [self.tensors[0]] * 3

    @property
    def beside_slots(self) -> list[torch.Tensor]:
        """entries, segments, strip_chunks, bounds, overflow."""
        return self.tensors[-5:] if self.layer.beside_slots.entries else [self.tensors[0]] * 5

    @property
    def sizes(self) -> tuple[int, ...]:
        """What all kernels take of a layer: K, blocks, width, scale_step."""
        layer = self.layer
        return layer.in_features, layer.blocks, layer.rows, layer.scale_step

    @property
    def constants(self) -> dict[str, Any]:
        return {"BITS": self.layer.bits, "GROUP": self.layer.group, "KIND": self.layer.kind, "PTX": PTX}

    @property
    def patched(self) -> dict[str, Any]:
        """Of kernels that read patches."""
        return {"ROUNDS": self.layer.rounds}


def wants_fours(tokens: int, target: str) -> bool:
    """Whether Triton gives the ``mma`` of a GPU, by its capability, operands in fours (middle.py): "" is none. Of tiles
    of 64 tokens and more it takes x through shared memory another time, were they in that order."""
    return TRITON < (3, 8) and tokens < 64 and target not in ("", "90", "100", "103", "gfx942")


def wants_apart(target: str) -> bool:
    """Whether products are to be added to sums apart, with the ``tcgen05`` of a GPU, by its capability: until 3.8
    Triton runs those that add to a loop's sums beside its next iteration, and does not compile our own PTX then."""
    return TRITON < (3, 9) and target.startswith(("10", "11"))


def wants_sides(tokens: int) -> int:
    """How many products a tile's weights are multiplied in, each with as many of its tokens, beside each other
    (middle.py). Triton 3.8 cuts a product in two, of which the second waits for the first; 3.9 spills registers."""
    return 2 if tokens > 128 and TRITON == (3, 8) else 1


@cache
def _target(device: torch.device) -> str:
    if device.type != "cuda" or torch.version.hip is not None:
        return ""
    return "".join(map(str, torch.cuda.get_device_capability(device)))


@cache
def most_splits(device: torch.device) -> int:
    """Programs of a tile that wait for each other (shares.py) must fit the device, which may be a part of a GPU, and
    beside them those of launches on a few other streams, which wait as well."""
    if device.type != "cuda":
        return MAX_SPLITS
    return max(1, min(MAX_SPLITS, torch.cuda.get_device_properties(device).multi_processor_count // 4))


Grid = tuple[int, int, int]  # tiles of tokens, tiles of rows, splits of the columns


def _row_tiles(layer: Layer, tile: Tile, experts: int) -> int:
    lists = layer.beside_slots.lists if tile.kernel == "one" else layer.strips
    return lists // tile.strips // experts


def fitted(layer: Layer, tile: Tile, token_tiles: int, experts: int = 1) -> Tile:
    """How the table's tile runs on a layer, or on ``experts`` that are stacked to one."""
    tile = narrowed(tile, layer.strips // experts) if tile.kernel == "middle" else tile
    return widened(tile, _row_tiles(layer, tile, experts) * token_tiles, layer.blocks)


def grid_of(layer: Layer, tile: Tile, token_tiles: int, experts: int = 1, most: int = MAX_SPLITS) -> Grid:
    """Of a layer, or of ``experts`` that are stacked to one; so that about ``programs`` of the tile run, at ``most`` so
    many on the same rows and tokens."""
    row_tiles = _row_tiles(layer, tile, experts)
    tiles = row_tiles * token_tiles
    steps = tile.steps(layer.blocks)
    splits = max(1, min(tile.programs // tiles, steps, most)) if tiles <= layer.counters else 1
    if tile.kernel == "one":  # none is idle, though all but the last have as many steps
        splits = -(-steps // -(-steps // splits))
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
    one = tile.kernel == "one"
    experts = routing.experts if routing else 1
    tile = fitted(layer, tile, call.token_tiles(tile), experts)
    grid = grid_of(layer, tile, call.token_tiles(tile), experts, most_splits(call.x.device))
    token_tiles, row_tiles, splits = grid
    split = LATER if one and layer.beside_slots.overflow else HERE if splits > 1 else WHOLE
    out = call.x.new_empty(call.tokens, call.out_features)
    shares = out
    if split != WHOLE:
        shares = call.x.new_empty(splits, token_tiles * row_tiles, 16 * tile.strips * tile.tokens, dtype=torch.float32)
    sums = Sums(split, out, shares)
    (_one if one else _middle)(call, tile, grid, sums, options)
    if split == LATER:
        _reduce(call, tile, grid, sums, options)
    return out


def _arrays(call: Call, sums: Sums) -> list[torch.Tensor]:
    """What both matrix kernels take first: x, the output, its shares, counters, the bias and the dense part."""
    bias = call.bias if sums.split != LATER else None
    return [call.x, sums.out, sums.shares, call.arrived, call.x if bias is None else bias, *call.dense]


def _constants(call: Call, tile: Tile, sums: Sums) -> dict[str, Any]:
    """What both matrix kernels are compiled for."""
    routing = call.routing
    constants = {"SPLIT": sums.split, "BIAS": call.bias is not None and sums.split != LATER, "S": tile.beside}
    constants |= {"TOP": routing.top if routing else 0, "EVEN": call.layer.in_features % (BLOCK * tile.k_warps) == 0}
    return constants | {"num_warps": tile.warps, "num_stages": tile.stages, **call.constants}


def _route(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """pairs and experts, or stand-ins."""
    return (call.routing.pairs, call.routing.chosen) if call.routing else call.dense


def rest_at_once(rest: int, k_warps: int, group: int, kind: int) -> tuple[int, bool]:
    """How many of the steps that do not go with blocks of columns a group of warps fetches before them, as many as it
    has registers for, and whether that leaves others for later."""
    most = max(1, 4 // k_warps) if group >= 128 and kind != CODEBOOK else 1
    return min(most, -(-rest // k_warps)), rest > min(MOST_REST, most * k_warps)


def _one(call: Call, tile: Tile, grid: Grid, sums: Sums, options: dict[str, Any]) -> None:
    layer = call.layer
    entries, segments, _, bounds, _ = call.beside_slots
    slots, further, owners = call.slots
    rest, more = rest_at_once(layer.rest, tile.k_warps, layer.group, layer.kind)
    constants = {"KW": tile.k_warps, "Q": layer.steps, "REST": rest, "MORE": more}
    shared = _constants(call, tile, sums)
    constants |= {
        "FULL": shared["EVEN"] and slots.shape[1] >= layer.blocks * layer.steps,
        "LISTS": bool(layer.beside_slots.entries),
    }
    token_tiles, row_tiles, splits = grid
    one_kernel[row_tiles, splits, token_tiles](
        *_arrays(call, sums),
        slots,
        owners,
        further,
        entries,
        segments,
        bounds,
        *_route(call),
        call.tokens,
        call.out_features,
        *call.sizes,
        layer.strips,
        slots.shape[1],
        **shared,
        **constants,
        **options,
    )


def _middle(call: Call, tile: Tile, grid: Grid, sums: Sums, options: dict[str, Any]) -> None:
    token_tiles, row_tiles, splits = grid
    target = _target(call.x.device)
    middle_kernel[splits, token_tiles, row_tiles](
        *_arrays(call, sums),
        *call.patches,
        *_route(call),
        call.tokens,
        call.out_features,
        *call.sizes,
        TOKENS=tile.tokens,
        COLUMNS=tile.columns,
        SPAN=tile.span,
        STACK=tile.stacks,
        FOURS=wants_fours(tile.tokens, target),
        APART=wants_apart(target),
        SIDES=wants_sides(tile.tokens),
        **call.patched,
        **_constants(call, tile, sums),
        **options,
    )


def _reduce(call: Call, tile: Tile, grid: Grid, sums: Sums, options: dict[str, Any]) -> None:
    _, row_tiles, splits = grid
    *_, overflow = call.beside_slots
    reduce_kernel[(-(-call.out_features // REDUCE_COLUMNS),)](
        sums.shares,
        sums.out,
        call.x if call.bias is None else call.bias,
        overflow,
        call.out_features,
        call.layer.strips,
        splits,
        row_tiles,
        BIAS=call.bias is not None,
        SPLITS=triton.next_power_of_2(splits),
        COLUMNS=REDUCE_COLUMNS,
        R=16 * tile.strips,
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
    rows = weight.shape[0]
    decode_kernel[(-(-rows // (16 * decode.strips)),)](
        weight,
        *call.dense,
        *call.patches,
        start // 16,
        rows,
        *call.sizes,
        **call.constants,
        **call.patched,
        S=decode.strips,
        KW=decode.k_warps,
        num_warps=decode.warps,
        num_stages=decode.stages,
        **FP_FUSION,
    )
