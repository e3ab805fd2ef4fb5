"""Which compilations serving can reach, for ``make aot``: every table's tiles x layers, or a cover of them."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import triton.language as tl

from requant_kernels.aot import Variant
from requant_kernels.dense_sparse.triton.fixup import reduce_kernel
from requant_kernels.dense_sparse.triton.launch import (
    REDUCE_COLUMNS,
    rest_at_once,
    wants_apart,
    wants_fours,
    wants_sides,
)
from requant_kernels.dense_sparse.triton.layer import (
    ASYMMETRIC,
    CODEBOOK,
    HERE,
    LATER,
    MOST_REST,
    MOST_STEPS,
    SYMMETRIC,
    WHOLE,
)
from requant_kernels.dense_sparse.triton.many import decode_kernel
from requant_kernels.dense_sparse.triton.middle import middle_kernel
from requant_kernels.dense_sparse.triton.one import one_kernel
from requant_kernels.dense_sparse.triton.patches import ROUNDS
from requant_kernels.dense_sparse.triton.route import COLUMNS, COMPARED
from requant_kernels.dense_sparse.triton.routing import (
    activate_kernel,
    align_kernel,
    combine_kernel,
)
from requant_kernels.dense_sparse.triton.table import Decode, Table, Tile, narrowed, shared_out, tables, widened

TARGETS = {"h200": ("90",), "a100": ("80",), "mi300": ("gfx942",), "default": ("80", "89", "90", "100")}
ACTIVATIONS = ("x_ptr", "bias_ptr", "out_ptr", "w_ptr", "h_ptr", "y_ptr")
FP32 = ("shares_ptr", "weights_ptr")
ALIGNED = ("N", "K", "width", "scale_step")
DTYPES = {"bf16": tl.bfloat16, "fp16": tl.float16}
KINDS = {SYMMETRIC: "symmetric", ASYMMETRIC: "asymmetric", CODEBOOK: "codebook"}
GROUPS = (16, 32, 64, 128, 256)
TOP = 8  # experts of a token
USUAL = 1  # rounds of patches, with 0.5 % entries


def _signature(kernel: Any, dtype: str, constants: dict[str, Any]) -> dict[str, str]:
    """Argument types; constexpr arguments are left out."""

    def kind(name: str) -> str:
        if name in FP32:
            return "*fp32"
        if name in ACTIVATIONS:
            return f"*{dtype}"
        return "*i32" if name.endswith("_ptr") else "i32"

    return {name: kind(name) for name in kernel.arg_names if name not in constants}


def _expected(tile: Tile | None, target: str) -> str:
    if tile is None:
        return ""
    if target == "gfx942":
        return "mfma"
    if tile.kernel == "one":
        return "mma"
    return {"90": "wgmma", "100": "tcgen05"}.get(target, "mma")


def variant(  # noqa: PLR0917
    table: str,
    rule: Tile | Decode,
    bits: int,
    group: int,
    kind: int,
    dtype: str,
    sparse: bool = True,
    split: int = WHOLE,
    crowded: bool = False,
    top: int = 0,
    rounds: int = 0,
    thin: bool = False,
) -> Variant:
    """top: of routed experts, how many a token has; rounds: of patches, the usual number where it is 0; thin: a block
    of columns has less than a step of slots."""
    constants: dict[str, Any] = {"BITS": bits, "GROUP": group, "KIND": kind, "PTX": table != "mi300"}
    tile = rule if isinstance(rule, Tile) else None
    constants["S"] = tile.beside if tile else rule.strips
    kernel, label = decode_kernel, "decode"
    if tile:
        kernel, label = (one_kernel, "one") if tile.kernel == "one" else (middle_kernel, f"middle m{tile.tokens}")
        constants |= {"SPLIT": split, "BIAS": split != LATER, "PDL": tables()[table].pdl, "TOP": top}
        constants["EVEN"] = not crowded
    if kernel is one_kernel:
        rest, more = rest_at_once(MOST_REST + crowded if sparse else 0, rule.k_warps, group, kind)
        steps = (MOST_STEPS if crowded else 1) if sparse else 0
        constants |= {"FULL": not (crowded or thin), "Q": steps, "REST": rest, "MORE": more, "LISTS": crowded}
    else:
        constants["ROUNDS"] = (rounds or (ROUNDS[-1] if crowded else USUAL)) if sparse else 0
    if kernel is middle_kernel:
        assert tile
        constants |= {"TOKENS": tile.tokens, "COLUMNS": tile.columns, "SPAN": tile.span, "STACK": tile.stacks}
        constants |= {"FOURS": partial(wants_fours, tile.tokens), "APART": wants_apart}
        constants["SIDES"] = wants_sides(tile.tokens)
    else:
        constants["KW"] = rule.k_warps
    if rule not in (*tables()[table].tiles, tables()[table].decode):
        label += f" {rule.k_warps} k_warps"
    name = (
        f"{table} {'experts ' if top else ''}{label} W{bits} g{group} {KINDS[kind]} {dtype}"
        + ("", " split", " overflow")[split]
    )
    name += " crowded" if crowded else " thin" if thin else " sparse" if sparse else " dense"
    name += f" {rounds} rounds" if rounds else ""
    targets = {target: _expected(tile, target) for target in TARGETS[table]}
    signature = _signature(kernel, dtype, constants)
    return Variant(name, kernel, signature, constants, ALIGNED, rule.warps, rule.stages, targets)


def _layers() -> Iterator[tuple[int, int, int]]:
    """(bits, group, kind) of every layer that there is."""
    for bits in (2, 3, 4, 8):
        yield from product((bits,), GROUPS, (SYMMETRIC, ASYMMETRIC))
        if bits < 8:
            yield bits, 256, CODEBOOK


def _distinct(tiles: Iterable[Tile]) -> list[Tile]:
    """Without those that differ from another one in nothing but the layers and tokens that they serve."""
    return list({replace(tile, up_to=tile.tokens, bits=None, codebook=None): tile for tile in tiles}.values())


def _every() -> Iterator[Variant]:
    for name, table in tables().items():
        for (bits, group, kind), dtype, sparse in product(_layers(), DTYPES, (True, False)):
            used = _distinct(tile for tile in table.tiles if table.tile(tile.up_to, bits, kind == CODEBOOK) is tile)
            for tile, crowded in product(used, (True, False) if sparse else (False,)):
                for split in (WHOLE, HERE, LATER) if sparse and tile.kernel == "one" else (WHOLE, HERE):
                    yield variant(name, tile, bits, group, kind, dtype, sparse, split, crowded)
                if tile.kernel == "one" and sparse and not crowded:
                    yield variant(name, tile, bits, group, kind, dtype, thin=True)
            for crowded in (True, False) if sparse else (False,):
                yield variant(name, table.decode, bits, group, kind, dtype, sparse, crowded=crowded)
            for tile, rounds in product((*used, table.decode), ROUNDS[:1] + ROUNDS[2:-1] if sparse else ()):
                if not isinstance(tile, Tile) or tile.kernel == "middle":
                    yield variant(name, tile, bits, group, kind, dtype, sparse, rounds=rounds)


def _large(hopper: Table) -> Iterator[Variant]:
    """What is near the limit of the registers on Hopper: tiles of more than 32 tokens, several rounds of patches."""
    sixteen, sixty_four, tall, most = (hopper.largest(tokens, 4, False) for tokens in (16, 64, 128, 256))
    for tile in (tall, narrowed(tall, 8), most):
        yield variant("h200", tile, 4, 128, SYMMETRIC, "bf16", split=HERE)
        yield variant("h200", tile, 4, 64, ASYMMETRIC, "bf16", split=HERE)
        yield variant("h200", tile, 2, 32, ASYMMETRIC, "fp16", crowded=True)
    for tokens in (64, 128, 256):
        of_3_bits = hopper.largest(tokens, 3, False)
        yield variant("h200", of_3_bits, 3, 64, ASYMMETRIC, "fp16", split=HERE)
        for top in (0, TOP):
            yield variant("h200", of_3_bits, 3, 64, ASYMMETRIC, "bf16", crowded=True, top=top)
    for tokens in (64, 128, 256):
        yield variant("h200", hopper.largest(tokens, 8, False), 8, 32, ASYMMETRIC, "bf16")
    for tile, rounds in product((sixteen, sixty_four, tall, most), ROUNDS[:1] + ROUNDS[2:-1]):
        yield variant("h200", tile, 4, 64, ASYMMETRIC, "bf16", rounds=rounds)


def _cover() -> Iterator[Variant]:
    """Every tile of every table once at W4 g128; then the layers that differ in code, on one table and few tiles."""
    for name, table in tables().items():
        for tile in _distinct(table.tiles):
            kind, group = (CODEBOOK, 256) if tile.codebook else (SYMMETRIC, 128)
            used = (bits for bits in (4, 8, 3, 2) if table.tile(tile.up_to, bits, kind == CODEBOOK) is tile)
            yield variant(name, tile, next(used), group, kind, "bf16")
    hopper = tables()["h200"]
    one, sixteen, sixty_four = (hopper.largest(tokens, 4, False) for tokens in (1, 16, 64))
    for bits, group, kind in (
        (2, 128, SYMMETRIC),
        (3, 128, SYMMETRIC),
        (4, 32, ASYMMETRIC),
        (4, 256, CODEBOOK),
        (8, 64, SYMMETRIC),
    ):
        yield variant("h200", hopper.largest(1, bits, kind == CODEBOOK), bits, group, kind, "bf16")
        yield variant("h200", hopper.decode, bits, group, kind, "bf16")
        yield variant("h200", shared_out(hopper.decode, 16), bits, group, kind, "bf16")
    yield variant("h200", one, 4, 128, SYMMETRIC, "fp16", sparse=False)
    yield variant("h200", sixteen, 8, 32, ASYMMETRIC, "fp16", split=HERE)
    yield variant("h200", sixteen, 8, 128, SYMMETRIC, "bf16", split=HERE)
    yield variant("h200", sixteen, 4, 32, ASYMMETRIC, "fp16", split=HERE)
    yield variant("h200", sixteen, 8, 16, ASYMMETRIC, "fp16", split=HERE)
    yield variant("h200", sixteen, 4, 256, CODEBOOK, "bf16")
    yield variant("h200", hopper.largest(16, 3, False), 3, 64, ASYMMETRIC, "bf16", crowded=True)
    yield from _large(hopper)
    for tile in (one, sixteen, sixty_four):
        yield variant("h200", tile, 4, 128, SYMMETRIC, "bf16", crowded=True)
        yield variant("h200", tile, 4, 128, SYMMETRIC, "bf16", split=HERE)
    yield variant("h200", one, 4, 128, SYMMETRIC, "bf16", split=LATER)
    yield variant("h200", one, 4, 128, SYMMETRIC, "bf16", thin=True)
    yield variant("h200", widened(one, 1, 56), 4, 128, SYMMETRIC, "bf16")
    for tokens in (32, 64, 128, 256):
        yield variant("h200", hopper.largest(tokens, 4, False), 4, 128, SYMMETRIC, "bf16", sparse=False)
    yield variant("a100", tables()["a100"].tiles[0], 3, 128, ASYMMETRIC, "fp16")
    for name in ("h200", "a100", "default"):
        for tokens in (1, 8, 16, 32, 64, 128, 2048):
            found = tables()[name].tile(tokens, 4, False)
            if found and found.up_to == tokens:
                yield variant(name, found, 4, 128, SYMMETRIC, "bf16", top=TOP)
    yield variant("default", tables()["default"].decode, 4, 128, SYMMETRIC, "bf16")
    yield variant("h200", hopper.decode, 3, 64, ASYMMETRIC, "bf16", crowded=True)


def _fixups() -> Iterator[Variant]:
    targets = dict.fromkeys(("80", "90", "100", "gfx942"), "")
    reduce = {"BIAS": True, "SPLITS": 4, "COLUMNS": REDUCE_COLUMNS, "R": 16, "PDL": False}
    signature = _signature(reduce_kernel, "bf16", reduce)
    yield Variant("reduce 4 splits", reduce_kernel, signature, reduce, ("N",), 4, 3, targets)
    for kernel, aligned, constants in (
        (align_kernel, (), {"EXPERTS": 128, "TOKENS": 8, "CHUNK": COMPARED // 128}),
        (activate_kernel, ("N",), {"COLUMNS": COLUMNS}),
        (combine_kernel, ("C",), {"TOP": TOP, "COLUMNS": COLUMNS}),
    ):
        constants |= {"PDL": False}
        signature = _signature(kernel, "bf16", constants)
        yield Variant(f"experts {kernel.__name__}", kernel, signature, constants, aligned, 4, 3, targets)


def variants(everything: bool) -> Iterator[Variant]:
    yield from _every() if everything else _cover()
    yield from _fixups()
