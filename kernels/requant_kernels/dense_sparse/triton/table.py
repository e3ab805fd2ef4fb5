"""Launch configurations as data: one JSON file per kind of GPU says which kernel runs from how many tokens, and how.

Nothing is tuned while serving. ``benchmarks/kernels.py --tune`` measures candidates and writes such a file.
"""

import json
from dataclasses import dataclass, fields, replace
from functools import cache
from importlib import resources
from typing import Any

import torch

DEFAULT = "default"
MOST_WARPS = 8  # of a program
BLOCKS_A_WARP = 8  # of columns that a group of warps decodes
SLICE = 128  # rows: what a program of a vendor's product takes, and layers are padded to


def evenly(pairs: int, experts: int) -> int:
    """Tokens of an expert, were ``pairs`` of tokens and experts shared out evenly."""
    return -(-pairs // experts)


@dataclass(frozen=True)
class Tile:
    """How a matrix kernel runs up to ``up_to`` tokens: a program takes 16 * ``strips`` rows and ``tokens`` tokens.

    A warp has a strip, or, of 16, two; with one token (kernel "one") each of ``k_warps`` groups of warps has some of
    the columns, at least so many groups, as ``widened`` says. Columns are split further until about ``programs``
    programs run. Kernel "middle": a program copies and decodes ``span`` columns at a time, of which a product takes
    ``columns``; 128 or 256 each. ``bits`` and ``codebook`` narrow the rule to some layers; None matches all.
    """

    kernel: str
    up_to: int
    tokens: int
    strips: int
    stages: int
    programs: int
    k_warps: int = 1
    columns: int = 128
    span: int = 256
    bits: tuple[int, ...] | None = None
    codebook: bool | None = None

    def __post_init__(self) -> None:
        if self.kernel not in ("one", "middle"):
            raise ValueError(f"kernel {self.kernel!r} is not 'one' or 'middle'")
        if self.kernel == "one" and (self.up_to, self.tokens) != (1, 1):
            raise ValueError(f"kernel one: up_to {self.up_to} and tokens {self.tokens} are not 1")
        if self.kernel == "middle" and self.k_warps != 1:
            raise ValueError("kernel middle: k_warps must be 1")
        if self.columns not in (128, 256):
            raise ValueError(f"columns {self.columns} is not 128 or 256")
        if self.span not in (self.columns, 256):
            raise ValueError(f"span {self.span} is not 256 or as many as columns, {self.columns}")

    @property
    def warps(self) -> int:
        # No fewer with one token: wrong sums, Triton 3.6 and 3.9, whose warps lose all but the first of their batches
        # (test_compiled.py). No more with several: a warp patches one strip at a time (patch.py).
        return self.beside * self.k_warps

    @property
    def beside(self) -> int:
        """Strips that a program takes side by side, each by a warp or group of warps."""
        return min(self.strips, MOST_WARPS)

    @property
    def stacks(self) -> int:
        """How often so many, one below the other."""
        return self.strips // self.beside

    def steps(self, blocks: int) -> int:
        """What a program of all columns, ``blocks`` of 256, goes through one after the other."""
        return -(-blocks // self.k_warps) if self.kernel == "one" else blocks * 256 // self.span

    def covers(self, tokens: int, bits: int, codebook: bool) -> bool:
        return (
            tokens <= self.up_to
            and (self.bits is None or bits in self.bits)
            and (self.codebook is None or codebook == self.codebook)
        )


@dataclass(frozen=True)
class Decode:
    """Beyond every tile: weights are decoded into a workspace of at most ``workspace_mib`` MiB, then multiplied.

    A program decodes 16 * ``strips`` rows, ``k_warps`` blocks of 256 columns at a time, each strip of one by a warp.
    """

    strips: int
    k_warps: int
    stages: int
    workspace_mib: int

    @property
    def warps(self) -> int:
        return self.strips * self.k_warps

    def slice_rows(self, rows: int, columns: int) -> int:
        """Of a layer [rows, columns], how many rows are decoded at a time: as many as fit, but at least SLICE."""
        fit = self.workspace_mib * 2**20 // (2 * columns)
        return max(SLICE, min(fit, rows) // SLICE * SLICE)


@cache
def narrowed(tile: Tile, strips: int) -> Tile:
    """The tile on layers, or experts, of ``strips`` strips, a multiple of 8: it takes no rows of two of them."""
    return tile if strips % tile.strips == 0 else replace(tile, strips=tile.beside)


@cache
def widened(tile: Tile, tiles: int, blocks: int) -> Tile:
    """The tile on ``tiles`` of rows and tokens; of one token and strip with as many groups of warps as run at once: the
    columns are split among a program's warps, up to MOST_WARPS, before they are split among programs, whose sums take a
    way through the device's memory."""
    if tile.tokens > 1 or tile.strips > 1:
        return tile
    groups, most = tile.k_warps, tile.programs * tile.k_warps // tiles
    while 2 * groups <= min(most, MOST_WARPS, blocks):
        groups *= 2
    wider = groups // tile.k_warps
    return replace(tile, k_warps=groups, programs=tile.programs // wider)


@cache
def shared_out(decode: Decode, blocks: int) -> Decode:
    """How rows of ``blocks`` blocks are decoded: by as few groups of warps, up to the table's, as have BLOCKS_A_WARP
    blocks each. More would run one after the other, and wait for each other to exchange weights for the store."""
    groups = 1
    while groups < decode.k_warps and groups * BLOCKS_A_WARP < blocks:
        groups *= 2
    return replace(decode, k_warps=groups)


@dataclass(frozen=True)
class Table:
    """``names``: parts of the device names it is for; ``source``: where the numbers come from; ``pdl``: kernels begin
    to fetch weights while the one before still runs (programmatic dependent launch, from compute capability 9.0 on)."""

    names: tuple[str, ...]
    source: str
    tiles: tuple[Tile, ...]
    decode: Decode
    pdl: bool = False

    def tile(self, tokens: int, bits: int, codebook: bool) -> Tile | None:
        """The first tile that covers the layer at ``tokens`` tokens; None means decode and multiply."""
        return next((tile for tile in self.tiles if tile.covers(tokens, bits, codebook)), None)

    def largest(self, tokens: int, bits: int, codebook: bool) -> Tile:
        """That of ``tile``, but where that is to decode and multiply, the tile of the most tokens."""
        most = max(tile.up_to for tile in self.tiles if tile.covers(tile.up_to, bits, codebook))
        tile = self.tile(min(tokens, most), bits, codebook)
        assert tile
        return tile

    def routed(self, tokens: int, each: int, bits: int, codebook: bool) -> Tile:
        """For experts that get ``each`` of ``tokens``, were they shared out evenly: as for a layer of so many, but of
        more than one where several tokens may go to the same expert, and never to decode and multiply."""
        return self.largest(1 if tokens == 1 else max(each, 2), bits, codebook)

    def regimes(self, bits: int, codebook: bool) -> tuple[int, ...]:
        """The smallest count of tokens for each way in which such a layer can run: each tile, each number of them."""
        starts = {1} | {tile.up_to + 1 for tile in self.tiles}
        for tile in self.tiles:
            starts.update(range(1, tile.up_to + 1, tile.tokens))
        first: dict[tuple[Tile | None, int], int] = {}
        for tokens in sorted(starts):
            chosen = self.tile(tokens, bits, codebook)
            first.setdefault((chosen, -(-tokens // chosen.tokens) if chosen else 0), tokens)
        return tuple(first.values())


def _tile(data: dict[str, Any]) -> Tile:
    if unknown := set(data) - {field.name for field in fields(Tile)}:
        raise ValueError(f"unknown key {min(unknown)!r}")
    return Tile(**data | ({"bits": tuple(data["bits"])} if data.get("bits") else {}))


def parse(data: dict[str, Any]) -> Table:
    """Raises ValueError or TypeError where the data are no table."""
    tiles = tuple(_tile(tile) for tile in data["tiles"])
    return Table(tuple(data["names"]), data["source"], tiles, Decode(**data["decode"]), data["pdl"])


@cache
def tables() -> dict[str, Table]:
    """All shipped tables by file name."""
    folder = resources.files(__package__).joinpath("configs")
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".json")), key=lambda file: file.name)
    return {file.name.removesuffix(".json"): parse(json.loads(file.read_text())) for file in files}


def choose(device_name: str) -> tuple[str, Table]:
    """The table whose names occur in ``device_name``, else the default one."""
    for name, table in tables().items():
        if any(part in device_name for part in table.names):
            return name, table
    return DEFAULT, tables()[DEFAULT]


@cache
def table_of(device: torch.device) -> Table:
    return choose(torch.cuda.get_device_name(device) if device.type == "cuda" else "")[1]
