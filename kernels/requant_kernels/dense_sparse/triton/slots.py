"""Where most entries of the sparse part stand at run time: in a row's own slots, so that the place says the row.

Slots. int32 [strips, depth, 32]: slot l of a step belongs to row l // 2 of the strip; an entry is its column in bits
0-15 and the value's 16 bits above. An empty slot is zero. A row's entries are in the order of ``Entries``. A kernel
knows where a strip's slots are without looking, and adds up a row's products in place. What a row has beyond its
2 * ``depth`` slots is left to lists.py, and so is all of a layer whose columns do not fit 16 bits.
"""

from dataclasses import dataclass
from typing import Self

import torch

from requant_kernels.dense_sparse.triton.lists import CHUNK
from requant_kernels.dense_sparse.triton.strips import BLOCK, STRIP
from requant_kernels.sparse import MAX_UINT16_COLUMNS, SparsePart

STEP = 32  # slots
# What the rest costs, in steps of a strip: a chunk of a list, and for every strip that there are lists at all.
CHUNK_COST, LISTS_COST = 12, 1
DEEPEST = 4  # times what the mean row needs, and a few


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
        block = rows * -(-sparse.in_features // BLOCK) + columns // BLOCK
        order = torch.argsort((block * 4 + columns // 2 % 4) * BLOCK + columns % BLOCK)
        return cls(rows, columns[order], sparse.values[order], at, (sparse.out_features, sparse.in_features))

    def where(self, mask: torch.Tensor) -> SparsePart | None:
        """The entries under ``mask`` bool [nnz]; None where there are none."""
        if not bool(mask.any()):
            return None
        return SparsePart.from_coo(self.rows[mask], self.columns[mask], self.values[mask], self.shape)


@dataclass(frozen=True)
class Slots:
    """slots int32 [strips, depth, 32]; ``rest``: the entries without one, None where there are none."""

    slots: torch.Tensor
    rest: SparsePart | None

    @property
    def depth(self) -> int:
        return self.slots.shape[1]


def choose_depth(counts: torch.Tensor) -> int:
    """The depth at which slots and lists together cost least; counts int [16 * strips]: the entries of each row."""
    by_strip = counts.view(-1, STRIP)
    most = min(-(-int(counts.max()) // 2), DEEPEST * (int(counts.float().mean()) // 2 + 4))
    depths = torch.arange(most + 1, device=counts.device)
    left = (by_strip[None] - 2 * depths[:, None, None]).clamp(min=0).sum(2)
    chunks = (-(-left // CHUNK)).sum(1)
    cost = len(by_strip) * (depths + LISTS_COST * (chunks > 0)) + CHUNK_COST * chunks
    return int(cost.argmin())


def build_slots(entries: Entries, strips: int) -> Slots:
    """The sparse part of a layer of ``strips`` strips, whose values are bfloat16 or float16, on its device."""
    rows, at, device = entries.rows, entries.at, entries.rows.device
    counts = torch.bincount(rows, minlength=strips * STRIP)
    depth = choose_depth(counts) if entries.shape[1] <= MAX_UINT16_COLUMNS else 0
    has = at < 2 * depth
    slots = torch.zeros(strips, depth, STEP, dtype=torch.int32, device=device)
    words = (entries.values.view(torch.int16).to(torch.int32) << 16) | entries.columns.to(torch.int32)
    row, at = rows[has], at[has]
    slots.view(-1)[(row // STRIP * depth + at // 2) * STEP + 2 * (row % STRIP) + at % 2] = words[has]
    return Slots(slots, entries.where(~has))
