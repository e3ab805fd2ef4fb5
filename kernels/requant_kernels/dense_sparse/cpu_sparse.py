"""The product with the sparse part on a CPU, for few tokens.

Rows hold two or three entries each. embedding_bag is the best that torch has for them; for a single token and a small
layer its calls take longer than the arithmetic, which is then one loop, compiled by numba where that is installed (it
comes with vLLM).
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch

SERIAL_ENTRIES = 1 << 15  # beyond them a second core pays


def add_sparse(
    y: torch.Tensor, x: torch.Tensor, row_offsets: torch.Tensor, columns: torch.Tensor, values: torch.Tensor
) -> None:
    """y [M, N] += x [M, K] S^T, both bf16 and contiguous; S by rows: int32 [N + 1], int32 [nnz], fp32 [nnz].

    Summed in fp32 and rounded once.
    """
    if len(x) == 1 and len(values) <= SERIAL_ENTRIES and (compiled := compiled_row()):
        bits = (part.view(torch.int16).numpy()[0] for part in (y, x))
        compiled(*bits, row_offsets.numpy(), columns.numpy(), values.numpy())
        return
    transposed = x.t().to(torch.float32, memory_format=torch.contiguous_format)
    # The function under torch.nn.functional's, whose checks take longer than a small layer: mode 0 is a sum.
    y += torch.embedding_bag(transposed, columns, row_offsets, False, 0, False, values, True)[0].t()


def _add_row(y: Any, x: Any, row_offsets: Any, columns: Any, values: Any) -> None:
    """Compiled. y int16 [N], x int16 [K]: bf16 bits."""
    input_bits = np.empty(len(x), np.int32)
    for column in range(len(x)):
        input_bits[column] = np.int32(x[column]) << 16
    inputs = input_bits.view(np.float32)
    bits = np.empty(1, np.int32)
    total = bits.view(np.float32)
    for row in range(len(y)):
        start, stop = np.uint32(row_offsets[row]), np.uint32(row_offsets[row + 1])
        if start == stop:
            continue
        product = np.float32(0)
        for entry in range(start, stop):
            product += values[entry] * inputs[np.uint32(columns[entry])]
        bits[0] = np.int32(y[row]) << 16
        total[0] += product
        if total[0] != total[0]:
            y[row] = 0x7FC0  # rounding would turn some NaN into infinity
        else:  # to nearest, ties to even
            y[row] = np.int16((bits[0] + 0x7FFF + ((bits[0] >> 16) & 1)) >> 16)


@cache
def compiled_row() -> Callable[..., None] | None:
    """``_add_row`` as machine code, which takes two seconds: asked for at load time. None without numba."""
    try:
        import numba
    except ImportError:
        return None
    signature = "void(int16[::1], int16[::1], int32[::1], int32[::1], float32[::1])"
    return numba.njit(signature, nogil=True, fastmath={"contract"})(_add_row)
