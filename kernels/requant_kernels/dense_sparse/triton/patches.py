"""The sparse part as the matrix kernels have it: the entries of a patch, half a block of a strip (strips.py), side by
side.

An entry is an int32: the value's 16 bits, and above them its place, the byte at which its weight would be if the patch
were decoded to words of two in the order of a strip's codes, plane by plane. A warp puts 32 of them at a time where
they belong (patch.py).
"""

from dataclasses import dataclass

import torch

from requant_kernels.dense_sparse.triton.lists import offsets_of
from requant_kernels.dense_sparse.triton.strips import BLOCK, STRIP, bits16
from requant_kernels.sparse import SparsePart

PATCH = BLOCK // 2  # columns
LANES = 32
PLANE = 512  # bytes: 16 rows x 16 columns of 2
SPARE_PATCHES = 2  # kernels may read, never use, where so many behind the last one begin
AHEAD = 8  # rounds at most whose entries a lane has fetched before they are wanted
ROUNDS = (1, 2, 4, AHEAD, AHEAD + 1)  # of a layer's kernels: the last takes what it has not fetched one by one


@dataclass(frozen=True)
class Patches:
    """entries int32 [nnz], patch by patch of a strip, strip by strip; starts int32 [strips * patches + 1 and spare]:
    where those of each patch begin; ``rounds``: how often a warp takes 32 of a patch, the least of ROUNDS that do for
    all."""

    entries: torch.Tensor
    starts: torch.Tensor
    rounds: int


def places(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """int32: the place of ``rows``, of a strip, and ``columns``, of a patch; int64 of any shape. As strips.py says."""
    word = rows % 8 * 16 + columns % 8 // 2 * 4 + columns % 16 // 8 * 2 + rows // 8
    return (columns // 16 * PLANE + word * 4 + columns % 2 * 2).to(torch.int32)


def build_patches(sparse: SparsePart, strips: int, blocks: int) -> Patches:
    """``sparse``, at least one entry, whose values, bfloat16 or float16, are as residuals.py says, of a layer of
    ``strips`` strips and ``blocks`` blocks of columns, on its device."""
    rows, columns = sparse.rows().long(), sparse.columns.to(torch.int64)
    across = blocks * (BLOCK // PATCH)
    patch = rows // STRIP * across + columns // PATCH
    order = torch.argsort(patch, stable=True)
    entries = places(rows % STRIP, columns % PATCH) << 16 | bits16(sparse.values)
    counts = torch.bincount(patch, minlength=strips * across)
    needed = min(-(-int(counts.max()) // LANES), ROUNDS[-1])
    rounds = next(rounds for rounds in ROUNDS if rounds >= needed)
    starts = torch.nn.functional.pad(offsets_of(counts), (0, SPARE_PATCHES), value=sparse.nnz)
    return Patches(entries[order], starts.to(torch.int32), rounds)
