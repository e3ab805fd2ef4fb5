"""What stands in no window (windows.py): a list of entries for each strip of 16 rows, one after the other.

An entry is its column and a word: in bits 0-15 the place of its row, 16 * list + row of the strip, modulo 2**16, the
value's 16 bits above. A list far longer than the mean would keep one program busy while the rest have finished: what
exceeds the bound becomes further lists, the *overflow*, worked on by programs of their own and added back by the
reduction.
"""

from dataclasses import dataclass

import torch

from requant_kernels.dense_sparse.triton.lists import LIST_ALIGNMENT, offsets_of, shared_out
from requant_kernels.dense_sparse.triton.strips import STRIP, padded, upper_half
from requant_kernels.sparse import SparsePart

SHORT = 64  # a list may have so many entries in any case: a tile of them takes no longer than one of weights


@dataclass(frozen=True)
class Leftovers:
    """columns, words int32 [entries]; offsets int32 [lists + 1], the first entry of each list (strips first, then
    overflow); overflow int32 [strips + 1], the overflow lists of each strip, counted from the first one."""

    columns: torch.Tensor
    words: torch.Tensor
    offsets: torch.Tensor
    overflow: torch.Tensor

    @property
    def lists(self) -> int:
        return len(self.offsets) - 1


def build_leftovers(sparse: SparsePart, strips: int, *, whole: bool = False) -> Leftovers:
    """``sparse``, a part of a layer of ``strips`` strips, whose values are bfloat16 or float16, on its device. whole:
    no list becomes several."""
    rows, columns = sparse.rows().long(), sparse.columns.to(torch.int32)
    strip = rows // STRIP
    counts = torch.bincount(strip, minlength=strips)
    longest, overflow = shared_out(counts, sparse.nnz if whole else SHORT)
    piece = (torch.arange(sparse.nnz, device=rows.device) - offsets_of(counts)[strip]) // longest
    of = torch.where(piece > 0, strips + overflow[strip] + piece - 1, strip)
    lists = padded(strips + int(overflow[-1]), LIST_ALIGNMENT)
    order = torch.argsort(of, stable=True)
    words = upper_half(sparse.values) | ((STRIP * of + rows % STRIP) & 0xFFFF).int()
    offsets = offsets_of(torch.bincount(of, minlength=lists))
    return Leftovers(columns[order], words[order], offsets.to(torch.int32), overflow.to(torch.int32))
