"""Where the Triton kernels' layout puts the sparse entries of real checkpoints: how far from evenly they lie.

    python benchmarks/placement.py CHECKPOINT...

A line for each checkpoint, over its layers with entries: their mean share of the weights; entries in the median row,
the 90th and the 99th percentile row and the fullest one, over the layer's mean (mean of layers); slots an entry, and
the share of entries that stand in lists because their rows are crowded (one_kernel reads both); and of all blocks of a
strip those that have more entries than 32, and than 64, a warp's two rounds (patch.py). Evenly scattered entries, 0.5 %
of 4096 columns, have 1.65 slots each, none in lists, and 0.7 % and none of the blocks.
"""

import sys
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch
from requant import architectures, models
from requant.markdown import table
from requant.sources import resolve, supported_config
from requant.stored import StoredCheckpoint, open_checkpoint
from requant_kernels.dense_sparse.triton.patches import LANES, build_patches
from requant_kernels.dense_sparse.triton.slots import build_slots
from requant_kernels.dense_sparse.triton.strips import BLOCK, ROW_ALIGNMENT, STRIP, padded
from requant_kernels.sparse import SparsePart

RANKS = (0.5, 0.9, 0.99, 1.0)
KEYS = ("row_offsets", "columns", "values")


def sparse_parts(stored: StoredCheckpoint) -> dict[str, SparsePart]:
    """By layer; layers without entries are left out."""
    model = models.skeleton(supported_config(resolve(stored.folder), "config.json"))
    architecture = architectures.architecture_of(model.config)
    parts = {}
    for name, linear in models.linears(model, architecture).items():
        if f"{name}.sparse_values" in stored.tensors:
            offsets, columns, values = (stored.read(f"{name}.sparse_{key}") for key in KEYS)
            part = SparsePart(offsets, columns, values, linear.in_features)
            if part.nnz:
                parts[name] = part
    return parts


class Placement(NamedTuple):
    """ranks: entries in rows of RANKS over the mean; slots: an entry; listed: the share of the entries in lists;
    second, third: of the blocks that need a second round, and a third."""

    ranks: list[float]
    slots: float
    listed: float
    second: float
    third: float


def measured(part: SparsePart) -> Placement:
    counts = part.row_offsets.diff().float()
    ranks = counts.quantile(torch.tensor(RANKS)) / counts.mean()
    strips = padded(part.out_features, ROW_ALIGNMENT) // STRIP
    patches = build_patches(part, strips, padded(part.in_features, BLOCK) // BLOCK)
    second, third = (float((patches.starts.diff() > rounds * LANES).float().mean()) for rounds in (1, 2))
    slots = build_slots(part, strips)
    if slots is None:
        return Placement(ranks.tolist(), 0.0, 1.0, second, third)
    listed = slots.rest.nnz if slots.rest else 0
    return Placement(ranks.tolist(), slots.slots.numel() / part.nnz, listed / part.nnz, second, third)


def main() -> None:
    rows = []
    for folder in map(Path, sys.argv[1:]):
        with open_checkpoint(folder).opened() as stored:
            parts = sparse_parts(stored)
        found = [measured(part) for part in parts.values()]
        density = mean(part.nnz / part.out_features / part.in_features for part in parts.values())
        ranks = " / ".join(f"{mean(one.ranks[i] for one in found):.1f}" for i in range(len(RANKS)))
        slots, listed, *rounds = (mean(values) for values in zip(*(one[1:] for one in found), strict=True))
        more = " / ".join(f"{share:.1%}" for share in rounds)
        rows.append((folder.name, f"{density:.2%}", ranks, f"{slots:.1f}", f"{listed:.0%}", more))
    head = ("checkpoint", "entries", "in rows of rank 50 / 90 / 99 / 100 %", "slots an entry", "in lists")
    print(table((*head, "patches of over 32 / 64"), rows))


if __name__ == "__main__":
    main()
