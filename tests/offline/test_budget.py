"""Target bits: costs are those of files, the choice is the best one, and it lands under the target."""

import re
from dataclasses import replace
from itertools import product

import pytest
import torch
from requant.budget import SLACK, Candidate, Losses, check_reach, choose, entry_bits, fixed_bits
from requant.errors import InputError
from requant.quantizers import kmeans
from requant_kernels.rounding import rtn
from requant_kernels.rounding.dense import attach_residual
from requant_kernels.scheme import LayerScheme, SparseScheme, WeightScheme

SCHEMES = [
    WeightScheme(2, 32, symmetric=False),
    WeightScheme(3, 64, symmetric=False),
    WeightScheme(4, -1, symmetric=True),
    WeightScheme(3, codebook=True),
]


@pytest.mark.parametrize("weights", SCHEMES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_costs_are_what_a_file_takes(weights: WeightScheme, dtype: torch.dtype) -> None:
    weight = torch.randn(8, 192, generator=torch.Generator().manual_seed(0))
    dense = (kmeans if weights.codebook else rtn).quantize(weight, weights, dtype=dtype)
    value_bits = 8 * dtype.itemsize
    assert fixed_bits((8, 192), LayerScheme(weights), value_bits) == dense.pack().stored_bits()
    stored = attach_residual(weight, dense, weight > 1, dtype)
    entries = int((weight > 1).sum()) * entry_bits(192, value_bits)
    assert fixed_bits((8, 192), LayerScheme(weights, SparseScheme()), value_bits) + entries == stored.stored_bits()


def losses_of(seed: int, scale: float) -> torch.Tensor:
    return torch.rand(4000, generator=torch.Generator().manual_seed(seed)) ** 8 * scale


def test_histograms_keep_sums() -> None:
    values = losses_of(0, 1.0)
    whole, ordered = Losses.of(values), values.double().sort(descending=True).values
    for removed in (0, 1, 37, 500, 3999, 4000):
        assert whole.left_after(removed) == pytest.approx(float(ordered[removed:].sum()), rel=0.01, abs=1e-12)
    count, rest = whole.above(0.3)
    assert count == pytest.approx(int((values > 0.3).sum()), rel=0.02)
    assert rest == pytest.approx(float(values[values <= 0.3].sum()), rel=0.02)
    halves = Losses.of(values[:1000]) + Losses.of(values[1000:])
    assert torch.equal(halves.counts, whole.counts)


def unit(seed: int, importance: float) -> list[Candidate]:
    """Losses fall fourfold with each bit, as they do."""
    return [
        Candidate(
            LayerScheme(WeightScheme(bits, 32), SparseScheme()),
            4000 * bits + 100,
            32,
            Losses.of(losses_of(seed, importance / 4**bits)),
        )
        for bits in (2, 3, 4)
    ]


@pytest.mark.parametrize("target", [2.1, 2.5, 3.3, 3.9])
def test_one_scheme_is_the_best_of_all(target: float) -> None:
    candidates = unit(0, 1.0)
    found = choose([candidates], 4000, target)
    spent, loss = {}, {}
    for one in candidates:
        entries = min(max(int(target * 4000) - one.fixed, 0) // 32, 400)
        spent[one.scheme] = one.fixed + 32 * entries
        if target * 4000 - SLACK * 4000 <= spent[one.scheme] <= target * 4000:
            loss[one.scheme] = one.losses.left_after(entries)
    assert found.schemes == [min(loss, key=loss.__getitem__)]
    assert target - SLACK <= spent[found.schemes[0]] / 4000 <= target


@pytest.mark.parametrize("target", [2.3, 3.05, 3.6])
def test_mixed_schemes_are_near_the_best_of_all(target: float) -> None:
    units = [unit(seed, importance) for seed, importance in enumerate((1.0, 30.0, 0.05, 3.0))]
    found, numel = choose(units, 16000, target), 16000

    def outcome(chosen: tuple[Candidate, ...]) -> float:
        entries = (int(target * numel) - sum(one.fixed for one in chosen)) // 32
        if not 0 <= entries <= numel // 10:
            return float("inf")
        total = chosen[0].losses
        for one in chosen[1:]:
            total += one.losses
        return total.left_after(entries)

    picked = tuple(next(one for one in u if one.scheme == s) for u, s in zip(units, found.schemes, strict=True))
    bits = sum(one.fixed for one in picked) + 32 * found.entries
    assert target - SLACK <= bits / numel <= target
    assert outcome(picked) <= 1.15 * min(outcome(chosen) for chosen in product(*units))
    # the unit that matters most is not stored worse than the one that matters least
    assert found.schemes[1].weights.bits >= found.schemes[2].weights.bits


def ends_named(units: list[list[Candidate]], target: float) -> list[float]:
    """Both ends that the refusal of ``target`` names last."""
    with pytest.raises(InputError, match=rf"target of {target:g} bits: this model can be stored in about") as refusal:
        choose(units, 4000 * len(units), target)
    return [float(number) for number in re.findall(r"\d\.\d\d", str(refusal.value))[-2:]]


@pytest.mark.parametrize("target", [1.0, 9.0])
@pytest.mark.parametrize("count", [1, 2])
def test_a_target_out_of_reach_names_the_range_with_all_that_the_sparse_part_holds(target: float, count: int) -> None:
    units = [unit(0, 1.0)] * count
    ends = ends_named(units, target)
    assert ends == [2.03, 7.23]  # (4000 * 2 + 100) / 4000; (4000 * 4 + 100 + 400 * 32) / 4000 + SLACK
    for end in ends:
        choose(units, 4000 * count, end)


def test_a_target_between_two_schemes_names_what_they_reach_next_to_it() -> None:
    few, many = unit(0, 1.0)[0], replace(unit(0, 1.0)[2], fixed=4000 * 8)
    ends = ends_named([[few, many]], 6.5)
    assert ends == [5.23, 8.0]
    for end in ends:
        choose([[few, many]], 4000, end)


@pytest.mark.parametrize("target", [1.0, 2.02, 2.03, 3.0, 6.5, 7.23, 7.25])
@pytest.mark.parametrize("count", [1, 2])
def test_without_losses_the_same_targets_are_refused(target: float, count: int) -> None:
    few, many = unit(0, 1.0)[0], replace(unit(0, 1.0)[2], fixed=4000 * 8)
    for units in ([unit(0, 1.0)] * count, [[few, many]]):
        refusals = []
        for refuse in (check_reach, choose):
            try:
                refuse(units, 4000 * len(units), target)
                refusals.append("")
            except InputError as error:
                refusals.append(str(error))
        assert refusals[0] == refusals[1]
