"""A layer in the kernels' layout, as the tensors and integers that pass through the operator."""

from dataclasses import astuple, dataclass
from typing import Self

import torch

from requant_kernels.dense_sparse.triton.lists import Lists, build_lists
from requant_kernels.dense_sparse.triton.slots import build_slots
from requant_kernels.dense_sparse.triton.strips import build_strips
from requant_kernels.weight import DenseSparseWeight

SYMMETRIC, ASYMMETRIC, CODEBOOK = range(3)
MANY = 3  # steps of slots: more than any kernel takes with a block of columns


@dataclass(frozen=True)
class Layer:
    """Everything about a layer that chooses and sizes a launch: ``Prepared.meta``."""

    in_features: int
    bits: int
    kind: int
    group: int  # columns under one step within a block of 256
    scale_step: int
    strips: int
    blocks: int
    lists: int  # strips and, behind them, overflow; a multiple of 8
    overflow: int  # 1 where there are overflow lists
    steps: int  # of slots for a block of columns, at most MANY; 0 where there are none
    tail: int  # 1 where there are entries in lists

    @classmethod
    def of(cls, meta: list[int]) -> Self:
        return cls(*meta)

    @property
    def sparse(self) -> bool:
        return bool(self.steps or self.tail)

    @property
    def rows(self) -> int:
        return self.strips * 16


def kind_of(weight: DenseSparseWeight) -> int:
    if weight.codebook is not None:
        return CODEBOOK
    return SYMMETRIC if weight.zero_point is None else ASYMMETRIC


def _list_tensors(lists: Lists) -> dict[str, torch.Tensor]:
    return {
        "sparse_entries": lists.entries,
        "sparse_segments": lists.segments,
        "sparse_chunks": lists.strip_chunks,
        "sparse_bounds": lists.bounds,
        "sparse_overflow": lists.overflow,
    }


def build(weight: DenseSparseWeight) -> tuple[dict[str, torch.Tensor], tuple[int, ...]]:
    """(tensors, meta) of ``weight``, laid out on its device. Slots and lists are absent where they hold nothing."""
    strips = build_strips(weight)
    tensors = {"weight_packed": strips.codes, "weight_scale": strips.scales}
    slots = build_slots(weight.sparse, strips.strips) if weight.sparse and weight.sparse.nnz else None
    lists = build_lists(slots.rest, strips.strips) if slots and slots.rest else None
    if slots and slots.depth:
        tensors["sparse_slots"] = slots.slots
    if lists:
        tensors |= _list_tensors(lists)
    layer = Layer(
        in_features=weight.in_features,
        bits=weight.scheme.weights.bits,
        kind=kind_of(weight),
        group=strips.group,
        scale_step=strips.scale_step,
        strips=strips.strips,
        blocks=strips.blocks,
        lists=lists.lists if lists else strips.strips,
        overflow=int(lists is not None and lists.lists > strips.strips),
        steps=min(MANY, -(-slots.depth // strips.blocks)) if slots else 0,
        tail=int(lists is not None),
    )
    return tensors, astuple(layer)
