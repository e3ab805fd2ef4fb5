"""Where in a row's slots (slots.py) the entries of 64 columns stand: a kernel can put them into decoded weights.

starts int32 [blocks, 16 * strips]: byte q of a word belongs to columns [64 q, 64 q + 64) of the block. It is the first
slot of their window, plus 128, less ``expected``: where it were if a row's entries stood at equal distances. A window
has ``width`` slots, the same number everywhere; what lies in none is left to leftovers.py.
"""

from dataclasses import dataclass

import torch

from requant_kernels.dense_sparse.triton.slots import Slots
from requant_kernels.sparse import SparsePart

SPAN = 64  # columns
IN_BLOCK = 4  # windows
WIDTHS = (1, 2, 4, 8)
WORTH = 0.04  # of all entries: windows as wide as WIDTHS has them must hold so many more to be worth their cost


@dataclass(frozen=True)
class Windows:
    """starts int32 [blocks, 16 * strips]; ``width``: slots; ``rest``: the entries in no window, None where there are
    none."""

    starts: torch.Tensor
    width: int
    rest: SparsePart | None


def expected(window: torch.Tensor, depth: int, blocks: int) -> torch.Tensor:
    """The slot at which ``window``, counted over the whole row, would start; as patch.py computes it."""
    return window * (2 * depth * 1024 // (IN_BLOCK * blocks)) >> 10


def build_windows(slots: Slots, sparse: SparsePart, blocks: int) -> Windows:
    """The windows of ``slots``, which hold ``sparse``, for ``blocks`` blocks of 256 columns."""
    rows, columns = sparse.rows().long(), sparse.columns.to(torch.int64)
    every = len(slots.slots) * 16
    count = IN_BLOCK * blocks
    inside = columns // SPAN
    held = torch.bincount(rows * count + inside, minlength=every * count).view(every, count).to(torch.int32)
    before = held.cumsum(1, dtype=torch.int32) - held
    guess = expected(torch.arange(count, dtype=torch.int32, device=rows.device), slots.depth, blocks)
    byte = (before - guess + 128).clamp(0, 255)
    starts = byte.view(every, blocks, IN_BLOCK).to(torch.uint8).view(torch.int32).view(every, blocks)
    slot = torch.arange(sparse.nnz, device=rows.device) - sparse.row_offsets[rows]
    place = slot - (byte + guess - 128)[rows, inside]
    place[(slot >= 2 * slots.depth) | (place < 0)] = WIDTHS[-1]
    gain = {width: int(((place >= width) & (place < WIDTHS[-1])).sum()) for width in WIDTHS}  # of the widest over it
    width = next(width for width in WIDTHS if gain[width] <= WORTH * sparse.nnz)
    left = place >= width
    shape = (sparse.out_features, sparse.in_features)
    rest = SparsePart.from_coo(rows[left], columns[left], sparse.values[left], shape) if bool(left.any()) else None
    return Windows(starts.t().contiguous(), width, rest)
