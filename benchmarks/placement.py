"""Where the Triton kernels' layout puts the sparse entries of real checkpoints: how far from evenly they lie.

    python benchmarks/placement.py CHECKPOINT...

A line for each checkpoint, over its layers with entries: their mean share of the weights; entries in the median row,
the 90th and the 99th percentile row and the fullest one, over the layer's mean (mean of layers); slots an entry, and
the share of entries that stand in lists because their rows are crowded (few_kernel reads both); the widths of windows,
by layers, and the share of entries in none (middle_kernel). Evenly scattered entries, 0.5 % of 4096 columns, have 1.35
slots each, none in lists and 2 % in no window.
"""

import sys
from collections import Counter
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch
from requant import models
from requant.markdown import table
from requant.sources import auto_config, resolve
from requant.stored import StoredCheckpoint, open_checkpoint
from requant_kernels.dense_sparse.triton.slots import Entries, build_slots
from requant_kernels.dense_sparse.triton.strips import BLOCK, ROW_ALIGNMENT, STRIP, padded
from requant_kernels.dense_sparse.triton.windows import build_windows
from requant_kernels.sparse import SparsePart

RANKS = (0.5, 0.9, 0.99, 1.0)
KEYS = ("row_offsets", "columns", "values")


def sparse_parts(stored: StoredCheckpoint) -> dict[str, SparsePart]:
    """By layer; layers without entries are left out."""
    architecture = models.architecture_of(str(stored.config.get("model_type")), "config.json")
    model = models.skeleton(auto_config(resolve(stored.folder)))
    parts = {}
    for name, linear in models.linears(model, architecture).items():
        if f"{name}.sparse_values" in stored.tensors:
            offsets, columns, values = (stored.read(f"{name}.sparse_{key}") for key in KEYS)
            part = SparsePart(offsets, columns, values, linear.in_features)
            if part.nnz:
                parts[name] = part
    return parts


class Placement(NamedTuple):
    """ranks: entries in rows of RANKS over the mean; slots: an entry; listed, left: shares of the entries in lists and
    in no window; width: of windows."""

    ranks: list[float]
    slots: float
    listed: float
    left: float
    width: int


def measured(part: SparsePart) -> Placement:
    counts = part.row_offsets.diff().float()
    ranks = counts.quantile(torch.tensor(RANKS)) / counts.mean()
    entries = Entries.of(part)
    slots = build_slots(entries, padded(part.out_features, ROW_ALIGNMENT) // STRIP)
    if slots is None:
        return Placement(ranks.tolist(), slots=0.0, listed=1.0, left=1.0, width=0)
    listed = slots.rest.nnz if slots.rest else 0
    windows = build_windows(slots, entries, padded(part.in_features, BLOCK) // BLOCK)
    left = windows.rest.nnz if windows.rest else 0
    return Placement(ranks.tolist(), slots.slots.numel() / part.nnz, listed / part.nnz, left / part.nnz, windows.width)


def main() -> None:
    rows = []
    for folder in map(Path, sys.argv[1:]):
        parts = sparse_parts(open_checkpoint(folder))
        found = [measured(part) for part in parts.values()]
        density = mean(part.nnz / part.out_features / part.in_features for part in parts.values())
        ranks = " / ".join(f"{mean(one.ranks[i] for one in found):.1f}" for i in range(len(RANKS)))
        widths = ", ".join(f"{width}: {count}" for width, count in sorted(Counter(one.width for one in found).items()))
        slots, listed, left = (mean(values) for values in zip(*(one[1:4] for one in found), strict=True))
        rows.append((folder.name, f"{density:.2%}", ranks, f"{slots:.1f}", f"{listed:.0%}", widths, f"{left:.0%}"))
    head = ("checkpoint", "entries", "in rows of rank 50 / 90 / 99 / 100 %", "slots an entry", "in lists")
    print(table((*head, "windows", "in no window"), rows))


if __name__ == "__main__":
    main()
