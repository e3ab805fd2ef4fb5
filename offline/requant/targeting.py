"""Fits schemes and sparse entries to a target of true bits, from one pass of gradients along one path."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from requant_kernels.scheme import BITS, GROUP_SIZES, LayerScheme, SparseScheme, WeightScheme

from requant.budget import Candidate, Losses, choose, entry_bits, fixed_bits
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
    shapes = {name: (weight.shape[0], weight.shape[1]) for name, weight in measurement.path.start.items()}

    def score(name: str, scheme: WeightScheme) -> torch.Tensor:
        measurement.path.end[name].copy_(rounded(measurement.path.start[name], scheme))
        return measurement.score(name)

    def candidates(unit: Unit) -> Iterator[Candidate]:
        entry = max(entry_bits(shapes[name][1], value_bits) for name in unit)
        for weights in _grids([shapes[name][1] for name in unit], like):
            losses = sum((Losses.of(score(name, weights)) for name in unit), Losses.none())
            for scheme in (LayerScheme(weights), LayerScheme(weights, SparseScheme())):
                fixed = sum(fixed_bits(shapes[name], scheme, value_bits) for name in unit)
                yield Candidate(scheme, fixed, entry, losses)

    numel = sum(rows * columns for rows, columns in shapes.values())
    choice = choose([list(candidates(unit)) for unit in units], numel, target)
    schemes = {name: scheme for unit, scheme in zip(units, choice.schemes, strict=True) for name in unit}
    sparse = [name for name, scheme in schemes.items() if scheme.sparse]
    for name, scheme in schemes.items():
        measurement.path.end[name].copy_(settled(measurement.path.start[name], scheme.weights))
    chosen = top_k(lambda: ((name, measurement.score(name)) for name in sparse), choice.entries)
    return Fitted(schemes, {name: mask_of(index, shapes[name]) for name, index in chosen.items()})


def _grids(widths: Sequence[int], like: WeightScheme) -> Iterator[WeightScheme]:
    for bits in BITS:
        if like.codebook:
            if bits < 8:
                yield WeightScheme(bits, codebook=True)
            continue
        for size in GROUP_SIZES:
            if size == -1 or all(width % size == 0 for width in widths):
                yield WeightScheme(bits, size, like.symmetric)
