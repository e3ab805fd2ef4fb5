"""A layer in the kernels' layout, as the tensors and integers that pass through the operator.

One of the tensors is written to: ``arrived`` counts shares of sums (shares.py), and is zero again after every call. So
a layer must not run twice at the same time.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Self

import torch

from requant_kernels.dense_sparse.triton.lists import build_lists
from requant_kernels.dense_sparse.triton.patches import build_patches
from requant_kernels.dense_sparse.triton.residuals import divisible, in_steps
from requant_kernels.dense_sparse.triton.slots import build_slots
from requant_kernels.dense_sparse.triton.strips import build_strips
from requant_kernels.weight import DenseSparseWeight

SYMMETRIC, ASYMMETRIC, CODEBOOK = range(3)
BITS_IN_STEPS = 4  # at most, of symmetric layers whose entries are in steps: the midpoint of 8 takes all of a bfloat16
WHOLE, HERE, LATER = range(3)  # what a program's sums are: finish.py
MOST_STEPS = 2  # of slots that go with a block of columns: as many as there are registers for
MOST_REST = 8  # steps beyond those that a kernel may fetch before the blocks, where no strip has further ones


class Beside(NamedTuple):
    """Lists of the entries that stand in no slot."""

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
    rounds: int  # of patches; 0 where there are no entries
    steps: int  # of slots that go with a block of columns, at most MOST_STEPS; 0 where there are none
    rest: int  # steps that do not; MOST_REST + 1 where they are more, or strips have further ones
    beside_slots: Beside

    @classmethod
    def of(cls, ints: Sequence[int]) -> Self:
        values: list[Any] = [*ints[:-3], Beside(*ints[-3:])]
        return cls(*values)

    @property
    def ints(self) -> tuple[int, ...]:
        *sizes, beside = (getattr(self, field.name) for field in fields(self))
        return (*sizes, *beside)

    @property
    def rows(self) -> int:
        return self.strips * 16

    @property
    def counters(self) -> int:
        """How many tiles of rows and tokens may have their columns split: enough for one token tile of strips, or
        several of larger tiles; beyond that there are programs enough."""
        return self.beside_slots.lists


def kind_of(weight: DenseSparseWeight) -> int:
    if weight.codebook is not None:
        return CODEBOOK
    return SYMMETRIC if weight.zero_point is None else ASYMMETRIC


def build(weight: DenseSparseWeight, *, routed: bool = False) -> tuple[dict[str, torch.Tensor], tuple[int, ...]]:
    """(tensors, meta) of ``weight``, laid out on its device. What would hold nothing is absent. routed: it is a
    stack of experts, whose crowded strips have no programs of their own."""
    sparse = weight.sparse if weight.sparse and weight.sparse.nnz else None
    added = sparse
    if sparse and kind_of(weight) == SYMMETRIC and weight.scheme.weights.bits <= BITS_IN_STEPS:
        weight = divisible(weight)
        added = in_steps(weight)
    strips = build_strips(weight)
    patches = build_patches(added, strips.strips, strips.blocks) if added else None
    slots = build_slots(sparse, strips.strips) if sparse else None
    steps = min(MOST_STEPS, max(1, slots.depth // strips.blocks)) if slots else 0
    rest = max(0, slots.depth - steps * strips.blocks) if slots else 0
    listed = slots.rest if slots else sparse
    lists = build_lists(listed, strips.strips, whole=routed) if listed else None
    layer = Layer(
        in_features=weight.in_features,
        bits=weight.scheme.weights.bits,
        kind=kind_of(weight),
        group=strips.group,
        scale_step=strips.scale_step,
        strips=strips.strips,
        blocks=strips.blocks,
        rounds=patches.rounds if patches else 0,
        steps=steps,
        rest=MOST_REST + 1 if slots and slots.deepened else min(rest, MOST_REST + 1),
        beside_slots=Beside(lists.lists, int(lists.lists > strips.strips), 1) if lists else Beside(strips.strips, 0, 0),
    )
    tensors = {"weight_packed": strips.codes, "weight_scale": strips.scales}
    tensors["arrived"] = torch.zeros(layer.counters, dtype=torch.int32, device=strips.codes.device)
    if patches:
        tensors |= {"sparse_patches": patches.entries, "sparse_starts": patches.starts}
    if slots:
        tensors |= {"sparse_slots": slots.slots, "sparse_further": slots.further, "sparse_owners": slots.owners}
    if lists:
        tensors |= {f"sparse_lists_{field.name}": getattr(lists, field.name) for field in fields(lists)}
    return tensors, layer.ints
