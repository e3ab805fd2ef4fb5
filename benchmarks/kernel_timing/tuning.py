"""Searches the launch table of a device: candidates for each number of tokens, checked and timed on one model's layers.

They are timed at one width in groups of 128 with 0.5 % entries; other widths, and codebooks, keep the table in use.
"""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Self

import torch
from requant_kernels.dense_sparse.triton.implementation import Triton
from requant_kernels.dense_sparse.triton.table import Decode, Table, Tile, parse, table_of
from requant_kernels.prepared import Prepared

from benchmarks.kernel_timing import layers
from benchmarks.kernel_timing.clock import microseconds
from benchmarks.kernel_timing.compilation import compile_all, workers
from benchmarks.kernel_timing.layers import Setting
from benchmarks.kernel_timing.recording import reason, usable, write_json
from benchmarks.kernel_timing.shapes import Shape

ENDS = (1, 16, 32, 64, 128, 256, 512, 1024, 2048)  # tokens up to which a tile may serve
GROUP, DENSITY = 128, 0.005
BITS = (2, 3, 4, 8)
WORKSPACES = (32, 64, 128, 256)  # MiB
DECODED_TOKENS = 4096  # at which the workspace is chosen
SMALL = Shape("tuning", "small", 1024, 4096)  # compiles what every larger layer runs


def candidates(up_to: int, processors: int, columns: int) -> Iterator[Tile]:
    """Tiles worth measuring; products of middle_kernel take 128 columns or ``columns``."""
    if up_to == 1:
        for k_warps, stages, waves in product((2, 4), (2, 3, 4), (4, 8, 14)):  # more k_warps where few rows are
            yield Tile("one", 1, 1, 1, stages, waves * processors, k_warps)
        return
    widths = {min(up_to, tokens) for tokens in (16, 32, 64, 128, 256) if 8 * tokens >= up_to or tokens == 128}
    ways = {(128, 256), (columns, 256), (128, 128)}  # columns of a product, of a span
    for tokens, strips, stages, waves, way in product(sorted(widths), (4, 8, 16), (2, 3), (1, 2, 3, 4), sorted(ways)):
        if strips == 16 and (way[0] != way[1] or waves > 2 or tokens * way[0] > 128 * 128):
            continue  # two stacks take a span in one product, and have as many registers as one program a processor
        if tokens <= 128 or (strips, waves, way) == (8, 1, (128, 128)):  # no more x fits the shared memory
            yield Tile("middle", up_to, max(tokens, 16), strips, stages, waves * processors, 1, *way)


def only(tile: Tile | None, in_use: Table, decode: Decode | None = None) -> Table:
    """A table that runs ``tile``, or decodes and multiplies without one; the rest as ``in_use``."""
    return replace(in_use, tiles=(tile,) if tile else (), decode=decode or in_use.decode)


@dataclass(frozen=True)
class Layer:
    """A layer as the kernels take it, copies that exceed the L2 cache, and its exact weight fp32 [N, K]."""

    shape: Shape
    prepared: Prepared
    copies: list[list[torch.Tensor]]
    exact: torch.Tensor

    @classmethod
    def of(cls, shape: Shape, bits: int, setting: Setting) -> Self:
        weight = layers.random_weight(shape, bits, GROUP, DENSITY, setting)
        prepared = layers.prepare(setting.implementation, weight, setting)
        copies = layers.rotated(list(prepared.tensors.values()), setting)
        return cls(shape, prepared, copies, layers.exact_weight(weight))


class Stand:
    """The layers at one number of tokens: what every candidate is compared with, and timed on."""

    def __init__(self, measured: Sequence[Layer], tokens: int, setting: Setting) -> None:
        self._setting = setting
        self._inputs = []
        for layer in measured:
            x = layers.activations(tokens, layer.shape, setting)
            self._inputs.append((layer, x, x.float() @ layer.exact.T))

    def time(self, table: Table) -> float:
        """Microseconds of all layers together; infinite, with a line about it, where ``table`` does not run or
        computes something else than the reference. Raises what has lost the device."""
        total = 0.0
        try:
            for layer, x, expected in self._inputs:
                calls = layers.calls(Triton(table), layer.prepared, layer.copies, x)
                layers.relative_error(calls[0](), expected)
                total += microseconds(calls, self._setting.device)
        except Exception as error:  # a candidate that does not run on this device is an answer, not a failure
            print(f"  discarded: {reason(error)}: {table.tiles or table.decode}")
            if not usable(self._setting.device):
                raise
            return float("inf")
        return total


def run_once(tile: Tile, bits: int, in_use: Table, setting: Setting) -> None:
    """Compiles the variants of ``tile``: with the columns whole, split among warps, and among programs."""
    weight = layers.random_weight(SMALL, bits, GROUP, DENSITY, setting)
    prepared = layers.prepare(Triton(only(tile, in_use)), weight, setting)  # the same for all
    for programs in (1, 256, 10**6):
        implementation = Triton(only(replace(tile, programs=programs), in_use))
        layers.run_once(implementation, prepared, SMALL, (tile.up_to,), setting)


def runnable(tiles: Sequence[Tile], bits: int, in_use: Table, setting: Setting, seconds: float) -> list[Tile]:
    """Those that compile and run, by all workers together, in about ``seconds``; the reasons of others are printed."""
    unique = list(dict.fromkeys(replace(tile, programs=1) for tile in tiles))
    tasks = [partial(run_once, tile, bits, in_use, setting) for tile in unique]
    failures = dict(zip(unique, compile_all(tasks, workers(setting.device), setting.device, seconds), strict=True))
    for failure, count in Counter(filter(None, failures.values())).items():
        print(f"  {count} of {len(unique)} candidates do not run: {failure}")
    return [tile for tile in tiles if not failures[replace(tile, programs=1)]]


@dataclass(frozen=True)
class Search:
    """What is tuned: ``bits`` of the weights, on layers of ``shapes``, up to ``tokens``; none is begun after
    ``deadline`` on the monotonic clock, and the table is written to ``path`` after each end that was decided."""

    bits: int
    shapes: Sequence[Shape]
    tokens: int
    deadline: float
    path: Path


def tune(search: Search, in_use: Table, setting: Setting) -> tuple[int, Table]:
    """A tile ends where decoding and multiplying is faster. The exit status, 1 where the table in use is wrong or
    nothing was decided, and the table that was written."""
    ends = [up_to for up_to in ENDS if up_to <= search.tokens]
    tiles = [tile for up_to in ends for tile in candidates(up_to, *_processors(setting.device))]
    tiles = [tile for tile in tiles if tile.covers(tile.up_to, search.bits, False)]
    if setting.device.type == "cuda":
        begun = time.monotonic()
        tiles = runnable(tiles, search.bits, in_use, setting, (search.deadline - begun) / 2)
        print(f"compiled in {time.monotonic() - begun:.0f} s")
    measured = [Layer.of(shape, search.bits, setting) for shape in search.shapes]
    decode = _fastest_decode(Stand(measured, DECODED_TOKENS, setting), in_use)
    chosen: list[Tile] = []
    sound, written = True, in_use
    for up_to in ends:
        stand = Stand(measured, up_to, setting)
        baseline = stand.time(in_use)
        times: dict[Tile | None, float] = {None: stand.time(only(None, in_use, decode))}
        of_the_table = in_use.tile(up_to, search.bits, False)
        own = [replace(of_the_table, up_to=up_to, bits=None, codebook=None)] if of_the_table else []
        for tile in dict.fromkeys([*own, *(tile for tile in tiles if tile.up_to == up_to)]):
            if time.monotonic() > search.deadline:
                print(f"{up_to:>5} tokens and more: not decided, the time was used up")
                return 0 if chosen and sound else 1, written
            times[tile] = stand.time(only(tile, in_use, decode))
        best = min(times, key=lambda tile: times[tile])
        sound = sound and baseline < float("inf")
        print(
            f"{up_to:>5} tokens: {times[best]:.1f} us by {best or 'decoding'}; the table in use {baseline:.1f} us; "
            f"decoded {times[None]:.1f} us; {len(times)} measured"
        )
        if best:
            chosen.append(best)
        tuned = replace(in_use, tiles=tuple(chosen), decode=decode)
        data = table_data(tuned, search.bits, in_use, _name(setting.device), ended=best is None)
        write_json(search.path, data)
        written = parse(data)
        if best is None:
            break
    return 0 if sound else 1, written


def table_in_use(setting: Setting) -> Table:
    return table_of(setting.device) if setting.device.type == "cuda" else layers.INTERPRETED


def _fastest_decode(stand: Stand, in_use: Table) -> Decode:
    """``in_use``'s with the workspace that is best for many tokens."""
    sizes = dict.fromkeys([in_use.decode.workspace_mib, *WORKSPACES])
    ways = {mib: replace(in_use.decode, workspace_mib=mib) for mib in sizes}
    times = {mib: stand.time(only(None, in_use, decode)) for mib, decode in ways.items()}
    print("workspace: " + ", ".join(f"{mib} MiB {micros:.1f} us" for mib, micros in times.items()))
    return ways[min(times, key=lambda mib: times[mib])]


def table_data(tuned: Table, bits: int, in_use: Table, name: str, *, ended: bool) -> dict[str, Any]:
    """``tuned`` for layers of ``bits`` as JSON data of a table for the device ``name``, followed by the tiles in use
    for all that was not tuned: other layers, and, unless the tuned ones ``ended`` because decoding is faster, more
    tokens."""
    tiles = [replace(tile, bits=(bits,), codebook=False) for tile in tuned.tiles]
    rest = [part for tile in in_use.tiles for part in (_others(tile, bits) if ended else (tile,))]
    return {
        "names": [name],
        "pdl": in_use.pdl,
        "source": f"measured by benchmarks/kernels.py --tune on {name}, triton {_triton_version()}; "
        f"what is not bits [{bits}] and codebook false, or beyond it, from the table before: {in_use.source}",
        "tiles": [{key: value for key, value in asdict(tile).items() if value is not None} for tile in [*tiles, *rest]],
        "decode": asdict(tuned.decode),
    }


def _others(tile: Tile, tuned: int) -> Iterator[Tile]:
    """The rule, for the layers alone that were not tuned: not of ``tuned`` bits, or with a codebook."""
    if bits := tuple(bits for bits in tile.bits or BITS if bits != tuned):
        yield replace(tile, bits=bits)
    if tile.codebook is not False and (tile.bits is None or tuned in tile.bits):
        yield replace(tile, bits=(tuned,), codebook=True)


def _processors(device: torch.device) -> tuple[int, int]:
    """How many there are, and the columns of a product: 256 where the tensor cores run beside the rest (wgmma)."""
    if device.type != "cuda":
        return 1, 128
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, 256 if properties.major >= 9 else 128


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the interpreter"


def _triton_version() -> str:
    import triton

    return str(triton.__version__)
