# Triton's language, typed by its own compiler; the arguments of a kernel are positional.
# mypy: ignore-errors
"""Sums over columns that are split among programs: the last program of a tile adds up the shares of all.

No sum depends on which program is last: it reads all shares back and adds them in their order. Only the count of those
that have arrived is atomic. The shares of a tile lie ``share`` elements apart; a counter for each tile is zero before
and after every launch, so that the same counters must not be used by two launches at the same time.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def _at_once(values):
    """How many shares of so many values are on their way at the same time: large ones would not fit the registers."""
    return 4 if values <= 2048 else 1


@triton.jit
def all_arrived(arrived_ptr, splits):
    """Counts the program's share, which it has stored; whether it is the last of the ``splits`` of its tile."""
    tl.debug_barrier()  # all threads have stored; the counter then releases that to whoever comes after
    return tl.atomic_add(arrived_ptr, 1, sem="acq_rel") == splits - 1


@triton.jit
def added_up(at, share, arrived_ptr, splits):
    """The sum of a tile's shares, the first of which is at ``at`` [rows, columns]; the counter is zero again."""
    total = tl.zeros(at.shape, at.dtype.element_ty)
    TOGETHER: tl.constexpr = _at_once(at.shape[0] * at.shape[1])
    for start in range(0, splits, TOGETHER):
        for s in tl.static_range(TOGETHER):
            there = tl.full((1, 1), start + s, tl.int32) < splits
            # past the L1, which knows nothing of other processors' stores
            total += tl.load(at + (start + s) * share, mask=there, other=0, cache_modifier=".cg")
    tl.store(arrived_ptr, 0)
    return total
