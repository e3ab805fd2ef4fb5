"""Searches the launch table of a device: candidates for each number of tokens, timed on one model's layers."""

from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import product
from typing import Any

import torch
from requant_kernels.dense_sparse.triton.implementation import Triton
from requant_kernels.dense_sparse.triton.table import Decode, Table, Tile, table_of

from benchmarks.kernel_timing import layers
from benchmarks.kernel_timing.clock import microseconds
from benchmarks.kernel_timing.compilation import Job, compile_all
from benchmarks.kernel_timing.layers import Setting
from benchmarks.kernel_timing.shapes import Shape

ENDS = (1, 4, 8, 16, 32, 64, 128, 256)  # tokens up to which a tile may serve
SCHEME = (4, 128, 0.005)
SMALL = Shape("tuning", "small", 1024, 4096)  # compiles what every larger layer runs


def candidates(up_to: int, processors: int) -> Iterator[Tile]:
    """Tiles worth measuring: few_kernel up to 32 tokens, middle_kernel from 16 on."""
    if up_to <= 32:
        for strips, k_warps, stages, waves in product((1, 2, 4), (2, 4, 8), (3, 4), (1, 2)):
            warps = max(4, k_warps)
            yield Tile("few", up_to, up_to, strips, warps, stages, waves * 2 * processors, k_warps)
    if up_to >= 16:
        for tokens, (strips, warps), stages, waves in product(
            sorted({min(up_to, 64), min(up_to, 128)}), ((4, 4), (8, 8)), (2, 3, 4), (1, 2)
        ):
            yield Tile("middle", up_to, tokens, strips, warps, stages, waves * processors)


def _only(tile: Tile | None, decode: Decode) -> Table:
    return Table((), "candidate", (tile,) if tile else (), decode)


def _time(table: Table, tokens: int, prepared: list[tuple[Shape, Any, Any]], setting: Setting) -> float:
    """Microseconds of all layers together."""
    implementation = Triton(table)
    total = 0.0
    for shape, layer, copies in prepared:
        x = layers.activations(tokens, shape, setting)
        total += microseconds(layers.calls(implementation, layer, copies, x), setting.device)
    return total


def _compiled(tiles: list[Tile], up_to: int, decode: Decode, setting: Setting) -> dict[Tile, str]:
    """What goes wrong with each tile, whatever its ``programs``; both its variants, split and whole, are compiled."""
    unique = list(dict.fromkeys(replace(tile, programs=1) for tile in tiles))
    variants = [(tile, replace(tile, programs=programs)) for tile in unique for programs in (1, 10**6)]
    jobs = [Job(SMALL, *SCHEME, (up_to,), _only(variant, decode)) for _, variant in variants]
    failures = dict.fromkeys(unique, "")
    for (tile, _), failure in zip(variants, compile_all(jobs, setting), strict=True):
        failures[tile] = failures[tile] or failure
    return failures


def tune(shapes: tuple[Shape, ...], setting: Setting) -> tuple[dict[str, Any], list[str]]:
    """(the table as JSON data, what was measured). A tile ends where decoding and multiplying is faster."""
    bits, group, density = SCHEME
    processors = torch.cuda.get_device_properties(setting.device).multi_processor_count
    decode = table_of(setting.device).decode
    prepared = []
    for shape in shapes:
        layer = layers.prepare(Triton(), layers.random_weight(shape, bits, group, density, setting), setting)
        prepared.append((shape, layer, layers.rotated(list(layer.tensors.values()), setting)))
    chosen: list[Tile] = []
    log: list[str] = []
    for up_to in ENDS:
        tiles = list(candidates(up_to, processors))
        failures = _compiled(tiles, up_to, decode, setting)
        timed = [
            (_time(_only(tile, decode), up_to, prepared, setting), tile)
            for tile in tiles
            if not failures[replace(tile, programs=1)]
        ]
        if not timed:
            raise RuntimeError(f"no candidate runs at {up_to} tokens: {next(iter(failures.values()))}")
        best, tile = min(timed, key=lambda pair: pair[0])
        decoded = _time(_only(None, decode), up_to, prepared, setting)
        log.append(f"{up_to:>5} tokens: {best:.1f} us by {tile}; decoded {decoded:.1f} us; {len(timed)} measured")
        if decoded < best:
            break
        chosen.append(tile)
    return _table_data(chosen, decode, setting), log


def _table_data(tiles: list[Tile], decode: Decode, setting: Setting) -> dict[str, Any]:
    name = torch.cuda.get_device_name(setting.device)
    return {
        "names": [name],
        "source": f"measured by benchmarks/kernels.py --tune on {name}, triton {_triton_version()}",
        "tiles": [{key: value for key, value in asdict(tile).items() if value is not None} for tile in tiles],
        "decode": asdict(decode),
    }


def _triton_version() -> str:
    import triton

    return str(triton.__version__)
