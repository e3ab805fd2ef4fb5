# Triton's language, typed by its own compiler; the arguments of a kernel are positional.
# mypy: ignore-errors
"""The sparse part inside a kernel: a chunk of 32 entries of 16 rows becomes one small product.

Entries are int32 words (lists.py): column in bits 0-11, relative to the chunk's segment; row of the strip in bits
12-15; the value's 16 bits above. Row selection is a one-hot matrix, so sums run in a fixed order without atomics.
"""

import triton
import triton.language as tl

from requant_kernels.dense_sparse.triton.decode import half_bits


@triton.jit
def onehot_rows(entries_ptr, segments_ptr, chunk, end, DT: tl.constexpr):
    """Chunk numbers [T], and their lists' ends [T] -> values DT [T, 16, 32], columns int32 and used bool [T, 32].

    The product of ``values`` with the gathered x [T, 32, tokens] is the chunks' share of T strips. Padding of a chunk
    and chunks at or beyond ``end`` are unused: x must not be read for them, it may hold infinities.
    """
    live = chunk < end
    e = tl.load(entries_ptr + chunk[:, None] * 32 + tl.arange(0, 32)[None, :], mask=live[:, None], other=0)
    base = tl.load(segments_ptr + chunk, mask=live, other=0)
    columns = base[:, None] + (e & 0xFFF)
    row = (e >> 12) & 0xF
    value = half_bits(e, 1, DT)
    hit = row[:, None, :] == tl.arange(0, 16)[None, :, None]
    return tl.where(hit, value[:, None, :], 0.0).to(DT), columns, (e >> 16) != 0
