"""Where in a row's slots (slots.py) the entries of one thread's columns stand: it puts them into its decoded weights.

A thread of a tensor core's operand has the columns 8 i + 2 t and 8 i + 2 t + 1 of a block of 256, t = 0 to 3. Those of
a row, a block and a t are a *window*, and a row's entries are in the order of windows. starts int32 [blocks,
16 * strips]: byte t of a word is the number of the first entry of window t, plus 128, less ``expected``: what it were
if the row's entries were at equal distances. A kernel looks at ``width`` entries of a window, the same number
everywhere; what lies beyond is left to leftovers.py, and so is the second entry of a pair of columns, because pairs are
put in whole.
"""

from dataclasses import dataclass

import torch

from requant_kernels.dense_sparse.triton.slots import Entries, Slots, window_of
from requant_kernels.sparse import SparsePart

IN_BLOCK = 4  # windows
WIDTHS = (1, 2, 4, 8)
WORTH = 0.04  # of all entries: windows as wide as WIDTHS has them must hold so many more to be worth their cost


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
    each = torch.bincount(rows * count + inside, minlength=every * count).view(every, count).to(torch.int32)
    before = each.cumsum(1, dtype=torch.int32) - each
    held = slots.rows >> 10
    guess = expected(torch.arange(count, dtype=torch.int32, device=device), held[:, None], blocks)
    byte = (before - guess + 128).clamp(0, 255)
    starts = byte.view(every, blocks, IN_BLOCK).to(torch.uint8).view(torch.int32).view(every, blocks)
    place = entries.at - (byte + guess - 128)[rows, inside]
    place[(entries.at >= held[rows]) | (place < 0)] = WIDTHS[-1]
    gain = {width: int(((place >= width) & (place < WIDTHS[-1])).sum()) for width in WIDTHS}  # of the widest over it
    width = next(width for width in WIDTHS if gain[width] <= WORTH * len(rows))
    second = torch.zeros_like(place, dtype=torch.bool)
    pair = rows * entries.shape[1] + columns // 2
    second[1:] = (pair[1:] == pair[:-1]) & (place[1:] > 0)  # the first of the pair is in the window, and hides it
    return Windows(starts.t().contiguous(), width, entries.where((place >= width) | second))
