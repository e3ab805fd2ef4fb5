"""Where most entries of the sparse part stand at run time: in lanes of their rows, so that the place says the row.

Slots. int32 [strips, depth, 32]: a strip of 16 rows has 32 lanes of ``depth`` slots. A row has 1, 2, 4 ... lanes side
by side, more of them the more entries it has; entry j of a row, in the order of ``Entries``, stands in lane j modulo
their number, one slot deeper each time that they are all used. An entry is its column in bits 0-15 and the value's 16
bits above; an empty slot is zero. A kernel knows where a strip's slots are without looking, and adds up a lane's
products in place. What does not fit a row's lanes is left to lists.py, and so is all of a layer whose columns do not
fit 16 bits.
"""

from dataclasses import dataclass
from typing import Self

import torch

from requant_kernels.dense_sparse.triton.lists import CHUNK
from requant_kernels.dense_sparse.triton.strips import BLOCK, STRIP, upper_half
from requant_kernels.sparse import MAX_UINT16_COLUMNS, SparsePart

LANES = 32
# What the rest costs, in steps of a strip: a chunk of a list, and for every strip that there are lists at all.
CHUNK_COST, LISTS_COST = 12, 1
DEEPEST = 4  # times what the mean row needs of two lanes, and a few


def window_of(columns: torch.Tensor) -> torch.Tensor:
    """The window (windows.py) of each of ``columns`` int64, counted over the row: four for a block of 256."""
    return columns // BLOCK * 4 + columns // 2 % 4


@dataclass(frozen=True)
class Entries:
    """A sparse part row by row, in a row by the window (windows.py), in a window by column: rows, columns and ``at``,
    the place within the row, int64 [nnz]; values [nnz]; ``shape`` [N, K]."""

    rows: torch.Tensor
    columns: torch.Tensor
    values: torch.Tensor
    at: torch.Tensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, sparse: SparsePart) -> Self:
        rows, columns = sparse.rows().long(), sparse.columns.to(torch.int64)
        at = torch.arange(sparse.nnz, device=rows.device) - sparse.row_offsets[rows]
        windows = 4 * -(-sparse.in_features // BLOCK)
        order = torch.argsort((rows * windows + window_of(columns)) * BLOCK + columns % BLOCK)
        return cls(rows, columns[order], sparse.values[order], at, (sparse.out_features, sparse.in_features))

    def where(self, mask: torch.Tensor) -> SparsePart | None:
        """The entries under ``mask`` bool [nnz]; None where there are none."""
        if not bool(mask.any()):
            return None
        return SparsePart.from_coo(self.rows[mask], self.columns[mask], self.values[mask], self.shape)


@dataclass(frozen=True)
class Slots:
    """slots int32 [strips, depth, 32]; owners int32 [strips, 32]: the row, of the strip's 16, that a lane belongs to;
    lanes int32 [16 * strips]: a row's first lane, and from bit 8 on the binary logarithm of their number; ``rest``: the
    entries without a slot, None where there are none."""

    slots: torch.Tensor
    owners: torch.Tensor
    lanes: torch.Tensor
    rest: SparsePart | None

    @property
    def depth(self) -> int:
        return self.slots.shape[1]


def choose_lanes(counts: torch.Tensor) -> torch.Tensor:
    """The binary logarithm of each row's number of lanes, int64 [strips, 16]; counts int64 [strips, 16]: its entries.
    Lanes are doubled, those of the deepest row first, as long as a strip has some."""
    logs = torch.zeros_like(counts)
    for _ in range(LANES - STRIP):
        spare = LANES - (1 << logs).sum(1, keepdim=True)
        load = torch.where((1 << logs) <= spare, counts / (1 << logs), 0.0)
        deepest = load.argmax(1, keepdim=True)
        logs.scatter_add_(1, deepest, (load.gather(1, deepest) > 1).long())
    return logs


def choose_depth(counts: torch.Tensor, logs: torch.Tensor) -> int:
    """The depth at which slots and lists together cost least; counts and logs int64 [strips, 16]: the entries of each
    row, and ``choose_lanes``."""
    most = int((-(-counts // (1 << logs))).max())
    most = min(most, DEEPEST * (int(counts.float().mean()) // 2 + 4))
    depths = torch.arange(most + 1, device=counts.device)
    left = (counts[None] - (depths[:, None, None] << logs)).clamp(min=0).sum(2)
    chunks = (-(-left // CHUNK)).sum(1)
    cost = len(counts) * (depths + LISTS_COST * (chunks > 0)) + CHUNK_COST * chunks
    return int(cost.argmin())


def build_slots(entries: Entries, strips: int) -> Slots:
    """The sparse part of a layer of ``strips`` strips, whose values are bfloat16 or float16, on its device."""
    rows, device = entries.rows, entries.rows.device
    counts = torch.bincount(rows, minlength=strips * STRIP).view(strips, STRIP)
    logs = choose_lanes(counts)
    first = (1 << logs).cumsum(1) - (1 << logs)
    depth = choose_depth(counts, logs) if entries.shape[1] <= MAX_UINT16_COLUMNS else 0
    log = logs.view(-1)[rows]
    step = entries.at >> log
    lane = first.view(-1)[rows] + (entries.at & ((1 << log) - 1))
    has = step < depth
    slots = torch.zeros(strips, depth, LANES, dtype=torch.int32, device=device)
    words = upper_half(entries.values) | entries.columns.to(torch.int32)
    slots.view(-1)[((rows // STRIP * depth + step) * LANES + lane)[has]] = words[has]
    # lanes that no row has are empty: whose they are does not matter
    owners = (torch.arange(LANES, device=device) >= first[:, :, None]).sum(1) - 1
    lanes = (first | (logs << 8)).view(-1)
    return Slots(slots, owners.to(torch.int32), lanes.to(torch.int32), entries.where(~has))
