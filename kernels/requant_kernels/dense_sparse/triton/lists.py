"""What crowded rows have beyond their slots (slots.py): a list of entries for each strip of 16 rows, none of them long.

An entry is an int32: column - segment in bits 0-11, row of the strip in bits 12-15, the value's 16 bits above. Lists
are sorted by column (x is read in order) and padded to whole chunks of 32 entries; a chunk lies in one segment of 4096
columns, whose first column stands in ``segments``. So any K fits in 32 bits an entry.

A list that is far longer than the mean would keep one program busy while the rest have finished. What exceeds the bound
becomes further lists, the *overflow*, worked on by programs of their own and added back by the reduction.
"""

from dataclasses import dataclass

import torch

from requant_kernels.dense_sparse.triton.strips import STRIP, padded, upper_half
from requant_kernels.sparse import SparsePart

CHUNK = 32
SEGMENT = 4096
LONGEST = 4  # a list may have this many times the mean number of chunks ...
SHORT = 32  # ... and this many in any case
LIST_ALIGNMENT = 8  # lists come in whole tiles of rows


@dataclass(frozen=True)
class Lists:
    """entries int32 [chunks * 32]; segments int32 [chunks], first column of each; strip_chunks int32 [strips + 1], the
    chunks of each strip; bounds int32 [lists, 2], first chunk and end of each list (strips first, then overflow);
    overflow int32 [strips + 1], the overflow lists of each strip, counted from the first one."""

    entries: torch.Tensor
    segments: torch.Tensor
    strip_chunks: torch.Tensor
    bounds: torch.Tensor
    overflow: torch.Tensor

    @property
    def lists(self) -> int:
        return self.bounds.shape[0]


def offsets_of(counts: torch.Tensor) -> torch.Tensor:
    """int64 [n + 1]: where each of n runs of ``counts`` elements begins, and the last one ends."""
    offsets = torch.zeros(len(counts) + 1, dtype=torch.int64, device=counts.device)
    offsets[1:] = counts.cumsum(0)
    return offsets


def shared_out(counts: torch.Tensor, short: int) -> tuple[int, torch.Tensor]:
    """(the most that a list may have, overflow int64 [strips + 1]) for strips that have ``counts`` int64 [strips]: the
    bound, at least ``short``, and the further lists of each strip, counted from the first one."""
    longest = max(short, LONGEST * -(-int(counts.sum()) // len(counts)))
    return longest, offsets_of((-(-counts // longest)).clamp(min=1) - 1)


def _entries(sparse: SparsePart, strips: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(entries, segments, strip_chunks)."""
    device, segments_a_row = sparse.values.device, -(-sparse.in_features // SEGMENT)
    rows, columns = sparse.rows(), sparse.columns.to(torch.int64)
    bucket = rows // STRIP * segments_a_row + columns // SEGMENT
    order = torch.argsort(bucket * SEGMENT + columns % SEGMENT, stable=True)
    counts = torch.bincount(bucket, minlength=strips * segments_a_row)
    chunks = -(-counts // CHUNK)
    first_chunk = offsets_of(chunks)
    entries = torch.zeros(int(first_chunk[-1]) * CHUNK, dtype=torch.int32, device=device)
    bucket, rows, columns = bucket[order], rows[order], columns[order]
    place = torch.arange(len(order), device=device) - offsets_of(counts)[bucket] + first_chunk[bucket] * CHUNK
    below = (rows % STRIP << 12).to(torch.int32) | (columns % SEGMENT).to(torch.int32)
    entries[place] = upper_half(sparse.values[order]) | below
    base = torch.arange(strips * segments_a_row, device=device) % segments_a_row * SEGMENT
    segments = torch.repeat_interleave(base, chunks).to(torch.int32)
    return entries, segments, first_chunk[::segments_a_row].to(torch.int32)


def _bounds(strip_chunks: torch.Tensor, whole: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(bounds, overflow) of lists none of which exceeds the bound, unless they are to stay ``whole``."""
    start, end = strip_chunks[:-1].long(), strip_chunks[1:].long()
    longest, overflow = shared_out(end - start, int(strip_chunks[-1]) if whole else SHORT)
    strip = torch.repeat_interleave(torch.arange(len(start), device=start.device), overflow.diff())
    piece = torch.arange(len(strip), device=start.device) - overflow[strip] + 1
    more_start = start[strip] + piece * longest
    starts = torch.cat([start, more_start])
    ends = torch.minimum(starts + longest, torch.cat([end, end[strip]]))
    empty = padded(len(starts), LIST_ALIGNMENT) - len(starts)
    bounds = torch.nn.functional.pad(torch.stack([starts, ends], 1), (0, 0, 0, empty))
    return bounds.to(torch.int32).contiguous(), overflow.to(torch.int32)


def build_lists(sparse: SparsePart, strips: int, *, whole: bool = False) -> Lists:
    """The sparse part of a layer of ``strips`` strips, whose values are bfloat16 or float16, on its device. whole: no
    list becomes several."""
    entries, segments, strip_chunks = _entries(sparse, strips)
    bounds, overflow = _bounds(strip_chunks, whole)
    return Lists(entries, segments, strip_chunks, bounds, overflow)
