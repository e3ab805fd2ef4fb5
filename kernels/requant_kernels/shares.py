# Triton's language, typed by its own compiler; the arguments of a kernel are positional.
# mypy: ignore-errors
"""Sums over columns that are split among programs, which store their shares of a tile and then add all of them up.

No sum depends on which program is when: all shares are read back and added in their order. Only the count of those that
have arrived is atomic. The shares of a tile lie ``share`` elements apart; a counter for each tile is zero before and
after every launch, so that the same counters must not be used by two launches at the same time.

Either the last program adds up (``all_arrived``), or each waits for the others and adds up a part of the tile
(``await_all``, ``leave``): as much is read by all as by the last one alone before, at the same time. For that the
programs of a tile must be next to each other in the grid, so that the first can not keep the last from running: GPUs
start them in this order.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def _count(instruction):
    """A program, its first thread, counts at $1; $2 is the second operand. Nothing waits for it, as Triton's do."""
    return f"""{{
        .reg .b32 %thread;
        .reg .pred %first;
        mov.u32 %thread, %tid.x;
        setp.eq.u32 %first, %thread, 0;
        @%first {instruction} [$1], $2;
        mov.b32 $0, 0;
        }}"""


@triton.jit
def all_arrived(arrived_ptr, splits):
    """Counts the program's share, which it has stored; whether it is the last of the ``splits`` of its tile."""
    tl.debug_barrier()  # all threads have stored; the counter then releases that to whoever comes after
    return tl.atomic_add(arrived_ptr, 1, sem="acq_rel") == splits - 1


@triton.jit
def await_all(arrived_ptr, splits):
    """Counts the program's share, which it has stored, and waits until all ``splits`` of its tile are there. PTX."""
    tl.debug_barrier()
    tl.inline_asm_elementwise(_count("red.release.gpu.global.add.u32"), "=r,l,r", [arrived_ptr, 1], tl.int32, False, 1)
    arrived = 0
    while arrived < splits:
        arrived = tl.atomic_add(arrived_ptr, 0, sem="acquire")


@triton.jit
def leave(arrived_ptr, splits):
    """After ``await_all``: the counter is zero again when all have left. PTX."""
    most = 2 * splits - 1  # after it comes zero
    tl.inline_asm_elementwise(
        _count("red.relaxed.gpu.global.inc.u32"), "=r,l,r", [arrived_ptr, most], tl.int32, False, 1
    )


@triton.jit
def added_up(at, share, splits, live, AT_ONCE: tl.constexpr):
    """The sum of a tile's shares, or of rows of it, the first of which is at ``at`` [rows, columns], where ``live``.
    AT_ONCE of them are on their way at the same time, for which there must be registers."""
    total = tl.zeros(at.shape, at.dtype.element_ty)
    for start in range(0, splits, AT_ONCE):
        for s in tl.static_range(AT_ONCE):
            # past the L1, which knows nothing of other processors' stores
            there = live & (tl.full((1, 1), start + s, tl.int32) < splits)
            total += tl.load(at + (start + s) * share, mask=there, other=0, cache_modifier=".cg")
    return total
