"""Launch configurations as data: one JSON file per kind of GPU. Nothing is tuned while serving."""

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import torch

DEFAULT = "default"
COUNTERS = 2048  # of a layer, one for each tile of a product whose columns are split (shares.py)


@dataclass(frozen=True)
class Tile:
    """How a layer runs up to ``up_to`` tokens (None: any number): a program takes ``tokens`` tokens, ``rows`` rows and
    ``columns`` columns at a time. Columns are split until about ``programs`` programs run.

    kernel: "fused" rounds inside the product, "product" before it; "product" walks ``group`` token tiles together.
    """

    kernel: str
    up_to: int | None
    tokens: int
    rows: int
    columns: int
    warps: int
    stages: int
    programs: int
    group: int = 8

    def __post_init__(self) -> None:
        if self.kernel not in ("fused", "product"):
            raise ValueError(f"kernel {self.kernel!r} is not 'fused' or 'product'")
        if self.kernel == "fused" and (self.up_to is None or self.tokens < self.up_to):
            raise ValueError(f"kernel fused: {self.tokens} tokens do not hold up_to {self.up_to}")
        if self.programs > 2 * COUNTERS:  # half as many tiles are the most whose columns are split
            raise ValueError(f"programs {self.programs} are more than {2 * COUNTERS}")

    def splits(self, tokens: int, out_features: int, in_features: int) -> int:
        """Programs among which the columns are split; each gets at least one step."""
        tiles = -(-tokens // self.tokens) * -(-out_features // self.rows)
        steps = -(-in_features // self.columns)
        share = -(-steps // max(1, min(self.programs // tiles, steps)))
        return -(-steps // share)


@dataclass(frozen=True)
class Table:
    """``names``: parts of the device names it is for; ``source``: where the numbers come from. A program of the
    rounding kernel takes ``round_block`` columns at a time."""

    names: tuple[str, ...]
    source: str
    tiles: tuple[Tile, ...]
    round_block: int
    round_warps: int

    def __post_init__(self) -> None:
        if not self.tiles or self.tiles[-1].up_to is not None:
            raise ValueError("the last tile must take any number of tokens")

    def tile(self, tokens: int) -> Tile:
        return next(tile for tile in self.tiles if tile.up_to is None or tokens <= tile.up_to)

    def regimes(self, out_features: int, in_features: int) -> tuple[int, ...]:
        """The smallest number of tokens for each way in which such a layer can run: each tile, split or not."""
        first: dict[tuple[Tile, bool], int] = {}
        start = 1
        for tile in self.tiles:
            # beyond ``programs`` tiles of tokens nothing is split any more
            for tokens in range(start, min(tile.up_to or 1 << 30, start + tile.programs * tile.tokens) + 1):
                split = tile.splits(tokens, out_features, in_features) > 1
                first.setdefault((tile, split), tokens)
                if not split:
                    break
            start = (tile.up_to or 0) + 1
        return tuple(sorted(first.values()))


def parse(data: dict[str, Any]) -> Table:
    """Raises ValueError, TypeError or KeyError where the data are no table."""
    tiles = tuple(Tile(**tile) for tile in data["tiles"])
    return Table(tuple(data["names"]), data["source"], tiles, data["round_block"], data["round_warps"])


@cache
def tables() -> dict[str, Table]:
    """All shipped tables by file name."""
    folder = resources.files(__package__).joinpath("configs")
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".json")), key=lambda file: file.name)
    return {file.name.removesuffix(".json"): parse(json.loads(file.read_text())) for file in files}


@cache
def table_of(device: torch.device) -> Table:
    """The table whose names occur in the device's name, else the default one."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((table for table in tables().values() if any(part in name for part in table.names)), tables()[DEFAULT])
