"""A layer in the kernels' layout, as the tensors and integers that pass through the operator.

One of the tensors is written to: ``arrived`` counts shares of sums (shares.py), and is zero again after every call. So
a layer must not run twice at the same time.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Self

import torch

from requant_kernels.dense_sparse.triton.leftovers import Leftovers, build_leftovers
from requant_kernels.dense_sparse.triton.lists import Lists, build_lists
from requant_kernels.dense_sparse.triton.slots import Entries, build_slots
from requant_kernels.dense_sparse.triton.strips import build_strips
from requant_kernels.dense_sparse.triton.windows import build_windows
from requant_kernels.weight import DenseSparseWeight

SYMMETRIC, ASYMMETRIC, CODEBOOK = range(3)
WHOLE, HERE, LATER = range(3)  # what a program's sums are: finish.py
# Leftovers read x entry by entry, 32 bytes for every 2. Transposing it first takes a launch, and less than that from so
# many tokens on; for layers that leave more of their entries than evenly scattered ones, always (docs/ROOFLINE.md).
TRANSPOSED_FROM, MANY_LEFT = 128, 0.025
MANY = 3  # steps of slots: more than any kernel takes with a block of columns


class Beside(NamedTuple):
    """Lists of the entries that stand in no slot, or no window."""

    lists: int  # strips and, behind them, overflow; a multiple of 8
    overflow: int  # 1 where there are overflow lists
    entries: int  # 1 where there are any


@dataclass(frozen=True)
class Layer:
    """Everything about a layer that chooses and sizes a launch; ``Prepared.meta`` in the order of ``ints``."""

    in_features: int
    bits: int
    kind: int
    group: int  # columns under one step within a block of 256
    scale_step: int
    strips: int
    blocks: int
    steps: int  # of slots for a block of columns, at most MANY; 0 where there are none
    deepened: int  # 1 where strips have further steps
    window: int  # entries of a window; 0 where there are no slots
    uneven: int  # 1 where more than MANY_LEFT of the entries are left over
    beside_slots: Beside
    beside_windows: Beside  # leftovers; all entries where there are no windows

    @classmethod
    def of(cls, ints: Sequence[int]) -> Self:
        values: list[Any] = [*ints[:11], Beside(*ints[11:14]), Beside(*ints[14:])]
        return cls(*values)

    @property
    def ints(self) -> tuple[int, ...]:
        *sizes, slots, windows = (getattr(self, field.name) for field in fields(self))
        return (*sizes, *slots, *windows)

    @property
    def sparse(self) -> bool:
        return bool(self.steps or self.beside_slots.entries)

    @property
    def rows(self) -> int:
        return self.strips * 16

    @property
    def counters(self) -> int:
        """How many tiles of rows and tokens may have their columns split: enough for one token tile of strips, or
        several of larger tiles; beyond that there are programs enough."""
        return max(self.beside_slots.lists, self.beside_windows.lists)

    def transposed(self, tokens: int) -> bool:
        """Whether tiles of ``tokens`` in the middle read x transposed for leftovers."""
        return bool(self.uneven or (self.beside_windows.entries and tokens >= TRANSPOSED_FROM))


def kind_of(weight: DenseSparseWeight) -> int:
    if weight.codebook is not None:
        return CODEBOOK
    return SYMMETRIC if weight.zero_point is None else ASYMMETRIC


def _tensors(part: Lists | Leftovers, name: str) -> dict[str, torch.Tensor]:
    return {f"sparse_{name}_{field.name}": getattr(part, field.name) for field in fields(part)}


def _beside(lists: Lists | Leftovers | None, strips: int) -> Beside:
    return Beside(lists.lists, int(lists.lists > strips), 1) if lists else Beside(strips, 0, 0)


def build(weight: DenseSparseWeight, *, routed: bool = False) -> tuple[dict[str, torch.Tensor], tuple[int, ...]]:
    """(tensors, meta) of ``weight``, laid out on its device. What would hold nothing is absent. routed: it is a
    stack of experts, whose crowded strips have no programs of their own."""
    strips = build_strips(weight)
    sparse = weight.sparse if weight.sparse and weight.sparse.nnz else None
    entries = Entries.of(sparse) if sparse else None
    slots = build_slots(entries, strips.strips) if entries else None
    windows = build_windows(slots, entries, strips.blocks) if entries and slots else None
    listed, rest = (slots.rest, windows.rest) if slots and windows else (sparse, sparse)
    lists = build_lists(listed, strips.strips, whole=routed) if listed else None
    leftovers = build_leftovers(rest, strips.strips, whole=routed) if rest else None
    beside_slots, beside_windows = (_beside(one, strips.strips) for one in (lists, leftovers))
    layer = Layer(
        in_features=weight.in_features,
        bits=weight.scheme.weights.bits,
        kind=kind_of(weight),
        group=strips.group,
        scale_step=strips.scale_step,
        strips=strips.strips,
        blocks=strips.blocks,
        steps=min(MANY, -(-slots.depth // strips.blocks)) if slots else 0,
        deepened=int(slots.deepened) if slots else 0,
        window=windows.width if windows else 0,
        uneven=int(sparse is not None and rest is not None and rest.nnz > MANY_LEFT * sparse.nnz),
        beside_slots=beside_slots,
        beside_windows=beside_windows,
    )
    tensors = {"weight_packed": strips.codes, "weight_scale": strips.scales}
    tensors["arrived"] = torch.zeros(layer.counters, dtype=torch.int32, device=strips.codes.device)
    if slots and windows:
        tensors |= {"sparse_slots": slots.slots, "sparse_further": slots.further}
        tensors |= {"sparse_owners": slots.owners, "sparse_rows": slots.rows, "sparse_windows": windows.starts}
    if lists:
        tensors |= _tensors(lists, "lists")
    if leftovers:
        tensors |= _tensors(leftovers, "left")
    return tensors, layer.ints
