"""Fits schemes and sparse entries to a target of true bits, from one pass of gradients along one path."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from requant_kernels.scheme import BITS, GROUP_SIZES, LayerScheme, SparseScheme, WeightScheme

from requant.budget import Candidate, Losses, check_reach, choose, entry_bits, fixed_bits
from requant.sensitivity.measure import Measurement
from requant.sensitivity.selection import mask_of, top_k

Rounder = Callable[[torch.Tensor, WeightScheme], torch.Tensor]
Unit = Sequence[str]  # names of matrices that share a scheme


@dataclass(frozen=True)
class Fitted:
    """schemes: of each matrix; masks: bool [N, K] of its sparse entries, where its scheme has any."""

    schemes: dict[str, LayerScheme]
    masks: dict[str, torch.Tensor]


def fit(
    measurement: Measurement,
    units: Sequence[Unit],
    target: float,
    *,
    like: WeightScheme,
    value_bits: int,
    rounded: Rounder,
    settled: Rounder,
) -> Fitted:
    """The least predicted loss within ``target`` true bits a weight; one of ``units`` for a scheme for all.

    An entry's loss is the measurement's score, with gradients as they are and the error that rounding to a candidate
    scheme makes: E[G_i^2] d_i^2, a diagonal second-order term. Candidates are uniform grids with ``like``'s symmetry,
    or codebooks where it has one. rounded(weight fp32 [N, K], scheme) -> fp32 [N, K] compares them; ``settled`` rounds
    to the choice before its entries are ranked, and leaves that at the path's end. value_bits: of the model's dtype.
    Raises InputError where the target is out of reach.
    """
    shapes = shapes_of(measurement.path.start)

    def score(name: str, scheme: WeightScheme) -> torch.Tensor:
        measurement.path.end[name].copy_(rounded(measurement.path.start[name], scheme))
        return measurement.score(name)

    def with_losses(unit: Unit) -> Iterator[Candidate]:
        for weights, pair in groupby(_candidates(shapes, unit, like, value_bits), lambda one: one.scheme.weights):
            losses = sum((Losses.of(score(name, weights)) for name in unit), Losses.none())
            yield from (replace(one, losses=losses) for one in pair)

    choice = choose([list(with_losses(unit)) for unit in units], numel_of(shapes), target)
    schemes = {name: scheme for unit, scheme in zip(units, choice.schemes, strict=True) for name in unit}
    sparse = [name for name, scheme in schemes.items() if scheme.sparse]
    for name, scheme in schemes.items():
        measurement.path.end[name].copy_(settled(measurement.path.start[name], scheme.weights))
    chosen = top_k(lambda: ((name, measurement.score(name)) for name in sparse), choice.entries)
    return Fitted(schemes, {name: mask_of(index, shapes[name]) for name, index in chosen.items()})


Shapes = Mapping[str, tuple[int, int]]


def shapes_of(weights: Mapping[str, torch.Tensor]) -> Shapes:
    return {name: (weight.shape[0], weight.shape[1]) for name, weight in weights.items()}


def numel_of(shapes: Shapes) -> int:
    return sum(rows * columns for rows, columns in shapes.values())


def check_target(shapes: Shapes, units: Sequence[Unit], target: float, *, like: WeightScheme, value_bits: int) -> None:
    """Raises InputError where ``fit`` would, as far as shapes alone tell."""
    check_reach([list(_candidates(shapes, unit, like, value_bits)) for unit in units], numel_of(shapes), target)


def _candidates(shapes: Shapes, unit: Unit, like: WeightScheme, value_bits: int) -> Iterator[Candidate]:
    """Without losses; each grid's next to each other."""
    entry, none = max(entry_bits(shapes[name][1], value_bits) for name in unit), Losses.none()
    for weights in _grids([shapes[name][1] for name in unit], like):
        for scheme in (LayerScheme(weights), LayerScheme(weights, SparseScheme())):
            fixed = sum(fixed_bits(shapes[name], scheme, value_bits) for name in unit)
            yield Candidate(scheme, fixed, entry, none)


def _grids(widths: Sequence[int], like: WeightScheme) -> Iterator[WeightScheme]:
    for bits in BITS:
        if like.codebook:
            if bits < 8:
                yield WeightScheme(bits, codebook=True)
            continue
        for size in GROUP_SIZES:
            if size == -1 or all(width % size == 0 for width in widths):
                yield WeightScheme(bits, size, like.symmetric)
