# Triton's language, typed by its own compiler; the arguments of a kernel are positional.
# mypy: ignore-errors
# ruff: noqa: PLR0917
"""x as the second operand of a product of few tokens: copied to shared memory, and from there to registers.

Until 3.7 Triton hands the operands of ``mma`` to threads in fours instead of pairs of columns where weights are joined
of halves: a thread's two columns of a plane of codes are next to those of the next one (decode.py: ``tile``, QUADS).
Where x stands in memory as it is, the compiler then moves what it loads from one register to another, a fifth of all
instructions. Paired, the eight columns that a thread multiplies of two planes stand together, those of the first half
of a plane beside those of the second, and one load fills registers as two products want them.
"""

import triton
import triton.language as tl


@triton.jit
def paired(COLUMNS: tl.constexpr):
    """Which column of COLUMNS, a multiple of 32, stands where: int32 [COLUMNS], of which two in turn are neighbours."""
    at = tl.arange(0, COLUMNS)  # t, plane of a pair, kh, half -> plane of a pair, kh, t, half
    at = at // 32 * 32 + at // 4 % 2 * 16 + at // 2 % 2 * 8 + at // 8 % 4 * 2 + at % 2
    return tl.max_contiguous(tl.multiple_of(at, 2), 2)


@triton.jit
def load_columns(
    x_ptr, m, K, block, last, START: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr, QUADS: tl.constexpr,
    PAIRED: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Columns [START, START + COLUMNS) of each ``block`` [KW] of rows ``m`` [TOKENS] of x [M, K], zero from column
    ``last`` on unless EVEN: [KW, COLUMNS, TOKENS], with QUADS in the order of ``tile``.

    PAIRED: x is what ``transpose_kernel`` makes of it, [K / 32, TOKENS, 32], each 32 columns paired. Threads that read
    two tokens at a time do not meet in a bank of shared memory then.
    """
    KW: tl.constexpr = block.shape[0]
    if PAIRED:
        first = (block * 256 + START) * TOKENS
        x = tl.load(x_ptr + first[:, None] + tl.arange(0, COLUMNS * TOKENS)[None, :])
        x = tl.reshape(x, (KW, COLUMNS // 32, TOKENS, 4, 2, 2, 2))  # pair of planes, token, t, plane of it, kh, half
        x = tl.permute(x, (0, 1, 5, 3, 4, 6, 2))
    else:
        columns = paired(COLUMNS) if QUADS and TOKENS == 1 else tl.arange(0, COLUMNS)
        k = (block * 256 + START)[:, None, None] + columns[None, None, :]
        if EVEN:
            x = tl.load(x_ptr + m[None, :, None] * K + k)
        else:
            x = tl.load(x_ptr + m[None, :, None] * K + k, mask=k < last, other=0.0)
        x = tl.permute(x, (0, 2, 1))
        if QUADS and TOKENS == 1:  # of more tokens pairs would take too many copies, of 4 bytes instead of 16
            x = tl.reshape(x, (KW, COLUMNS // 32, 4, 2, 2, 2, TOKENS))  # pair of planes, t, plane of it, kh, half
            x = tl.permute(x, (0, 1, 4, 2, 3, 5, 6))
        elif QUADS:
            x = tl.reshape(x, (KW, COLUMNS // 32, 2, 2, 4, 2, TOKENS))  # pair of planes, plane of it, kh, t, half
            x = tl.permute(x, (0, 1, 3, 4, 2, 5, 6))
    return tl.reshape(x, (KW, COLUMNS, TOKENS))
