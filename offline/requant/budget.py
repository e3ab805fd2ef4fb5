"""From a target of true bits a weight to schemes and a number of sparse entries, by predicted loss.

Every candidate scheme of a matrix has fixed costs (codes, steps, offsets) and, for each entry i, a predicted loss s_i,
which an entry in the sparse part takes away for the price of its value and column. Minimising the sum of losses under
the target is a knapsack problem: over one scheme for the whole model it is solved by enumeration, over one for each
unit by Lagrangian relaxation (docs/METHODS.md). Ours; the papers set ratios by hand.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from requant_kernels.packing import packed_length
from requant_kernels.scheme import LayerScheme
from requant_kernels.sparse import column_dtype

from requant.errors import InputError

SLACK = 0.01  # bits a weight that may be left over
MOST_SPARSE = 0.1  # of a model's entries
_ROUNDS = 60  # of bisection: more than the bins of a histogram can tell apart
_DROPPED = 18  # bits of fp32 that a histogram does not see
_BINS = 1 << (31 - _DROPPED)


def fixed_bits(shape: tuple[int, int], scheme: LayerScheme, value_bits: int) -> int:
    """All bits of a layer [N, K] in a file, sparse entries apart; ``value_bits``: of the model's dtype."""
    (rows, columns), weights = shape, scheme.weights
    groups = weights.groups(columns)
    bits = 32 * rows * packed_length(columns, weights.bits)
    bits += value_bits * rows * (weights.levels if weights.codebook else groups)
    if not weights.symmetric:
        bits += 32 * rows * packed_length(groups, weights.bits)
    return bits + (32 * (rows + 1) if scheme.sparse else 0)


def entry_bits(columns: int, value_bits: int) -> int:
    """Bits of one sparse entry of a matrix with so many columns."""
    return value_bits + 8 * column_dtype(columns).itemsize


@dataclass(frozen=True)
class Losses:
    """Predicted losses of many entries, all >= 0, as a histogram: counts int64 and sums fp64 [8192], ascending.

    Bins are the leading bits of fp32 patterns: entries of one bin differ by at most 1 in 32.
    """

    counts: torch.Tensor
    sums: torch.Tensor

    @classmethod
    def of(cls, losses: torch.Tensor) -> "Losses":
        flat = losses.float().flatten()
        index = flat.view(torch.int32) >> _DROPPED
        counts = torch.bincount(index, minlength=_BINS)
        return cls(counts, torch.bincount(index, flat.double(), minlength=_BINS))

    @classmethod
    def none(cls) -> "Losses":
        return cls.of(torch.empty(0))

    def __add__(self, other: "Losses") -> "Losses":
        return Losses(self.counts + other.counts, self.sums + other.sums)

    def left_after(self, removed: int) -> float:
        """What remains when the ``removed`` largest are gone."""
        above = self.counts.flip(0).cumsum(0).flip(0)
        whole = above <= removed
        partly = int((~whole).nonzero()[-1]) if not bool(whole.all()) else None
        left = float(self.sums[~whole].sum())
        if partly is None:
            return 0.0
        taken = removed - int(above[partly] - self.counts[partly])
        return left - taken * float(self.sums[partly] / self.counts[partly].clamp(min=1))

    def above(self, price: float) -> tuple[int, float]:
        """How many are dearer than ``price``, and the sum of the others."""
        mean = self.sums / self.counts.clamp(min=1)
        dear = mean > price
        return int(self.counts[dear].sum()), float(self.sums[~dear].sum())


@dataclass(frozen=True)
class Candidate:
    """A scheme for a unit (matrices that must share one): fixed bits, bits of an entry, predicted losses."""

    scheme: LayerScheme
    fixed: int
    entry: int
    losses: Losses

    def relaxed(self, price: float) -> tuple[float, int]:
        """(loss + price * bits, bits) where every entry that is worth its price is in the sparse part."""
        count, rest = (
            self.losses.above(price * self.entry) if self.scheme.sparse else (0, float(self.losses.sums.sum()))
        )
        bits = self.fixed + count * self.entry
        return rest + price * bits, bits


@dataclass(frozen=True)
class Choice:
    """A scheme for each unit, and how many entries the sparse parts of all of them take."""

    schemes: list[LayerScheme]
    entries: int


def choose(units: Sequence[Sequence[Candidate]], numel: int, target: float) -> Choice:
    """The least predicted loss at no more than ``target`` bits for each of ``numel`` weights, and no less than SLACK
    under it. units: the candidates of each; a single unit is solved exactly. Raises InputError where no choice lands.
    """
    limit = math.floor(target * numel)
    chosen = _enumerated(units[0], limit, numel) if len(units) == 1 else _relaxed(units, limit)
    if not chosen or not _lands(chosen, limit, numel):
        raise _out_of_reach(units, numel, target)
    return Choice([one.scheme for one in chosen], _entries(chosen, limit, numel))


def check_reach(units: Sequence[Sequence[Candidate]], numel: int, target: float) -> None:
    """What needs no losses, before they are measured. Raises InputError where no ``choose`` can land."""
    limit = math.floor(target * numel)
    if len(units) == 1:
        reached = any(_lands([one], limit, numel) for one in units[0])
    else:
        least, most = ([end(unit, key=lambda one: one.fixed) for unit in units] for end in (min, max))
        reached = _spent(least, 0, numel) <= limit and limit - SLACK * numel <= _spent(most, limit, numel)
    if not reached:
        raise _out_of_reach(units, numel, target)


def _out_of_reach(units: Sequence[Sequence[Candidate]], numel: int, target: float) -> InputError:
    return InputError(f"target of {target:g} bits: this model can be stored in {_reach(units, numel, target)}")


def _entries(chosen: Sequence[Candidate], limit: int, numel: int) -> int:
    """As many as fit."""
    sparse = [one.entry for one in chosen if one.scheme.sparse]
    left = limit - sum(one.fixed for one in chosen)
    return min(max(left, 0) // max(sparse), int(MOST_SPARSE * numel)) if sparse else 0


def _spent(chosen: Sequence[Candidate], limit: int, numel: int) -> int:
    return sum(one.fixed for one in chosen) + _entries(chosen, limit, numel) * max(one.entry for one in chosen)


def _lands(chosen: Sequence[Candidate], limit: int, numel: int) -> bool:
    return limit - SLACK * numel <= _spent(chosen, limit, numel) <= limit


def _reach(units: Sequence[Sequence[Candidate]], numel: int, target: float) -> str:
    """The least and the most bits a weight with all entries that the sparse part may hold; for a target that falls
    between two schemes for all, also what they reach next to it."""

    def span(chosen: Sequence[Candidate]) -> tuple[float, float]:
        """Of targets that land: rounded inwards, as they are printed."""
        least, most = (_spent(chosen, limit, numel) / numel for limit in (0, 64 * numel))
        return math.ceil(100 * least) / 100, math.floor(100 * (most + SLACK)) / 100

    least, _ = span([min(unit, key=lambda one: one.fixed) for unit in units])
    _, most = span([max(unit, key=lambda one: one.fixed) for unit in units])
    whole = f"about {least:.2f} to {most:.2f}"
    if len(units) > 1 or not least < target < most:
        return whole
    spans = [span([one]) for one in units[0]]
    below = max((high for _, high in spans if high < target), default=least)
    above = min((low for low, _ in spans if low > target), default=most)
    return f"{whole}, by one scheme for all not between {below:.2f} and {above:.2f}"


def _enumerated(unit: Sequence[Candidate], limit: int, numel: int) -> list[Candidate]:
    landing = [[one] for one in unit if _lands([one], limit, numel)]
    return min(landing, key=lambda one: one[0].losses.left_after(_entries(one, limit, numel)), default=[])


def _relaxed(units: Sequence[Sequence[Candidate]], limit: int) -> list[Candidate]:
    """The choice at the lowest price of a bit, a power of ten found by bisection, at which the bits suffice."""
    low, high, best = -40.0, 40.0, list[Candidate]()
    for _ in range(_ROUNDS):
        exponent = (low + high) / 2
        costs = [[one.relaxed(10.0**exponent) for one in unit] for unit in units]
        picks = [min(range(len(cost)), key=cost.__getitem__) for cost in costs]
        if sum(cost[pick][1] for cost, pick in zip(costs, picks, strict=True)) > limit:
            low = exponent
        else:
            high, best = exponent, [unit[pick] for unit, pick in zip(units, picks, strict=True)]
    return best
