"""Which compilations serving can reach, for ``make aot``: every table's tiles x schemes, or a cover of them."""

from collections.abc import Iterator
from itertools import product
from typing import Any

from requant_kernels.aot import Variant
from requant_kernels.w8a8.triton.fused import fused_kernel
from requant_kernels.w8a8.triton.product import product_kernel
from requant_kernels.w8a8.triton.rounding import round_kernel
from requant_kernels.w8a8.triton.table import Table, Tile, tables

TARGETS = {"default": ("80", "89", "90", "100")}
DTYPES = ("bf16", "fp16", "fp32")
INTS = ("codes_ptr", "weight_ptr")
FLOATS = ("scale_ptr", "static_scale_ptr", "weight_scale_ptr")


def _signature(kernel: Any, dtype: str, constants: dict[str, Any]) -> dict[str, str]:
    """Argument types; constexpr arguments are left out."""

    def kind(name: str) -> str:
        if name in INTS:
            return "*i8"
        if name in FLOATS:
            return "*fp32"
        if name in ("x_ptr", "bias_ptr", "out_ptr"):
            return f"*{dtype}"
        return "*i32" if name.endswith("_ptr") else "i32"

    return {name: kind(name) for name in kernel.arg_names if name not in constants}


def _expected(tile: Tile, target: str) -> str:
    """Matrix instructions of a whole warp group take 64 tokens."""
    return {"90": "wgmma", "100": "tcgen05"}.get(target, "mma") if tile.tokens >= 64 else "mma"


def _tile(table: str, tile: Tile, dtype: str, dynamic: bool, symmetric: bool, split: bool, even: bool) -> Variant:  # noqa: PLR0917
    constants: dict[str, Any] = {
        "SYMMETRIC": symmetric,
        "BIAS": True,
        "SPLIT": split,
        "EVEN": even,
        "TOKENS": tile.tokens,
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
    }
    kernel = product_kernel
    if tile.kernel == "fused":
        kernel = fused_kernel
        constants["DYNAMIC"] = dynamic
    else:
        constants["GROUP"] = tile.group
    name = f"{table} w8a8 {tile.kernel} {tile.tokens}x{tile.rows}x{tile.columns} {dtype}"
    name += (" dynamic" if dynamic else " static") if tile.kernel == "fused" else ""
    name += (" symmetric" if symmetric else " asymmetric") + (" split" if split else "") + ("" if even else " uneven")
    targets = {target: _expected(tile, target) for target in TARGETS[table]}
    signature = _signature(kernel, dtype, constants)
    return Variant(name, kernel, signature, constants, ("N", "K"), tile.warps, tile.stages, targets)


def _passes(name: str, table: Table, dtype: str, dynamic: bool, symmetric: bool) -> Iterator[Variant]:
    targets = dict.fromkeys(TARGETS[name], "")
    scheme = f"{'dynamic' if dynamic else 'static'} {'symmetric' if symmetric else 'asymmetric'}"
    constants: dict[str, Any] = {"DYNAMIC": dynamic, "SYMMETRIC": symmetric, "BLOCK": table.round_block}
    signature = _signature(round_kernel, dtype, constants)
    label = f"{name} w8a8 round {dtype} {scheme}"
    yield Variant(label, round_kernel, signature, constants, ("K",), table.round_warps, 3, targets)


def variants(everything: bool) -> Iterator[Variant]:
    """Everything, or each tile once as it is mostly used, and each scheme once on the smallest."""
    both = (True, False)
    for name, table in tables().items():
        for tile in table.tiles:
            if everything:
                for dtype, dynamic, symmetric, split, even in product(DTYPES, both, both, both, both):
                    if dynamic or tile.kernel == "fused":
                        yield _tile(name, tile, dtype, dynamic, symmetric, split, even)
            else:
                yield _tile(name, tile, "bf16", True, True, False, True)
        yield from _passes(name, table, "bf16", True, True)
        first = table.tiles[0]
        if everything:
            for dtype, dynamic, symmetric in product(DTYPES, both, both):
                if (dtype, dynamic, symmetric) != ("bf16", True, True):
                    yield from _passes(name, table, dtype, dynamic, symmetric)
        else:
            yield from _passes(name, table, "fp16", True, False)
            yield _tile(name, first, "fp16", True, False, True, False)
            yield _tile(name, first, "bf16", False, True, False, True)
            yield _tile(name, table.tiles[-1], "bf16", True, False, False, False)
