# Triton's language, typed by its own compiler; the arguments of a kernel are positional.
# mypy: ignore-errors
# ruff: noqa: PLR0917
"""x of one token as the second operand of a product: copied to shared memory, and from there to registers.

Until 3.7 Triton hands the operands of ``mma`` to threads in fours instead of pairs of columns where weights are joined
of halves: a thread's two columns of a plane of codes are next to those of the next one (decode.py: ``tile``, QUADS).
Where x stands in memory as it is, the compiler then moves what it loads from one register to another, a fifth of all
instructions. Paired, the eight columns that a thread multiplies of two planes stand together, those of the first half
of a plane beside those of the second, and one load fills registers as two products want them.
"""

import triton
import triton.language as tl


@triton.jit
def _paired(COLUMNS: tl.constexpr):
    """Which column of COLUMNS, a multiple of 32, stands where: int32 [COLUMNS], of which two in turn are neighbours."""
    at = tl.arange(0, COLUMNS)  # t, plane of a pair, kh, half -> plane of a pair, kh, t, half
    at = at // 32 * 32 + at // 4 % 2 * 16 + at // 2 % 2 * 8 + at // 8 % 4 * 2 + at % 2
    return tl.max_contiguous(tl.multiple_of(at, 2), 2)


@triton.jit
def load_columns(
    x_ptr, block, last, START: tl.constexpr, COLUMNS: tl.constexpr, QUADS: tl.constexpr, EVEN: tl.constexpr
):  # fmt: skip
    """Columns [START, START + COLUMNS) of each ``block`` [KW] of x [K], zero from column ``last`` on unless EVEN:
    [KW, COLUMNS, 1], with QUADS in the order of ``tile``."""
    KW: tl.constexpr = block.shape[0]
    columns = _paired(COLUMNS) if QUADS else tl.arange(0, COLUMNS)
    k = (block * 256 + START)[:, None, None] + columns[None, None, :]
    if EVEN:  # noqa: SIM108 (of the two only one is compiled)
        x = tl.load(x_ptr + k)
    else:
        x = tl.load(x_ptr + k, mask=k < last, other=0.0)
    x = tl.permute(x, (0, 2, 1))
    if QUADS:
        x = tl.reshape(x, (KW, COLUMNS // 32, 4, 2, 2, 2, 1))  # pair of planes, t, plane of it, kh, half
        x = tl.permute(x, (0, 1, 4, 2, 3, 5, 6))
    return tl.reshape(x, (KW, COLUMNS, 1))
