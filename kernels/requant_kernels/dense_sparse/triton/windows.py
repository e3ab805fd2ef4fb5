"""Where in a row's slots (slots.py) the entries of one thread's columns stand: it puts them into its decoded weights.

A thread of a tensor core's operand has the columns 8 i + 2 t and 8 i + 2 t + 1 of a block of 256, t = 0 to 3. Those of
a row, a block and a t are a *window*, and a row's entries are in the order of windows. starts int32 [blocks,
16 * strips]: byte t of a word is the number of the first entry of window t, plus 128, less ``expected``: what it were
if the row's entries were at equal distances. A kernel looks at ``width`` entries of a window, the same number
everywhere. Where these are more than IN_SIGHT, it compares each of a window's columns with IN_SIGHT of them only: the
first that do not lie before its QUARTER of the block.

What is not seen so is left to leftovers.py, and so is the second entry of a pair of columns, because pairs are put in
whole.
"""

from dataclasses import dataclass

import torch

from requant_kernels.dense_sparse.triton.slots import Entries, Slots, window_of
from requant_kernels.dense_sparse.triton.strips import BLOCK
from requant_kernels.sparse import SparsePart

IN_BLOCK = 4  # windows
WIDTHS = (1, 2, 4, 8)
QUARTER, IN_SIGHT = 64, 2
WORTH = 0.04  # of all entries: windows as wide as WIDTHS has them must hold so many more to be worth their cost
FAR = 128  # a window that begins so much later than expected, or a little more than that earlier, holds nothing


@dataclass(frozen=True)
class Windows:
    """starts int32 [blocks, 16 * strips]; ``width``: entries; ``rest``: the entries in no window, None where there are
    none."""

    starts: torch.Tensor
    width: int
    rest: SparsePart | None


def expected(window: torch.Tensor, held: torch.Tensor, blocks: int) -> torch.Tensor:
    """The entry with which ``window``, counted over the whole row, would begin of ``held`` in a row; as patch.py has
    it."""
    return window * (held * 1024 // (IN_BLOCK * blocks)) >> 10


def build_windows(slots: Slots, entries: Entries, blocks: int) -> Windows:
    """The windows of ``slots``, which hold ``entries``, for ``blocks`` blocks of 256 columns."""
    rows, columns, device = entries.rows, entries.columns, entries.rows.device
    every, count = len(slots.rows), IN_BLOCK * blocks
    inside = window_of(columns)
    window = rows * count + inside
    each = torch.bincount(window, minlength=every * count).view(every, count).to(torch.int32)
    before = each.cumsum(1, dtype=torch.int32) - each
    held = slots.rows >> 10
    guess = expected(torch.arange(count, dtype=torch.int32, device=device), held[:, None], blocks)
    late = before - guess
    byte = torch.where(late < FAR, late + FAR, 2 * FAR - 1 - WIDTHS[-1])  # looks at what comes before the window
    byte = torch.where(late < -FAR, 2 * FAR - 1, byte)  # ... and behind it: it holds 64 at most
    starts = byte.view(every, blocks, IN_BLOCK).to(torch.uint8).view(torch.int32).view(every, blocks)
    found = (late >= -FAR) & (late < FAR)
    there = found[rows, inside] & (entries.at < held[rows])
    rank, in_quarter = entries.at - before[rows, inside], _rank(window * 4 + columns % BLOCK // QUARTER)
    seen = {width: there & _seen(rank, in_quarter, width) for width in WIDTHS}
    most = int(seen[WIDTHS[-1]].sum())
    width = next(width for width in WIDTHS if most - int(seen[width].sum()) <= WORTH * len(rows))
    second = torch.zeros_like(there)
    pair = rows * entries.shape[1] + columns // 2
    second[1:] = (pair[1:] == pair[:-1]) & seen[width][:-1]  # the first of the pair hides it
    return Windows(starts.t().contiguous(), width, entries.where(~seen[width] | second))


def _rank(groups: torch.Tensor) -> torch.Tensor:
    """How many of the same group stand before each; groups int64 [n]: side by side."""
    places = torch.arange(len(groups), device=groups.device)
    first = torch.ones_like(groups, dtype=torch.bool)
    first[1:] = groups[1:] != groups[:-1]
    return places - torch.where(first, places, 0).cummax(0).values


def _seen(rank: torch.Tensor, in_quarter: torch.Tensor, width: int) -> torch.Tensor:
    """bool [nnz]: whether a kernel sees the entry that is the ``rank``-th of its window and the ``in_quarter``-th of
    its quarter."""
    return (rank < width) & (in_quarter < IN_SIGHT) if width > IN_SIGHT else rank < width
