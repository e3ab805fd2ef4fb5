from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from requant.detach.outliers import EXPONENTS, MOST, adaptive, beyond_quartiles, largest, ratios

layers = st.dictionaries(
    st.sampled_from("abcdef"), st.tuples(st.floats(0, 1e6, width=32), st.integers(1, 10**6)), min_size=1
)


@given(layers, st.floats(0, MOST), st.sampled_from(EXPONENTS))
def test_ratios_spend_the_budget_exactly_and_grow_with_sensitivity(found: dict, budget: float, exponent: float) -> None:
    means, sizes = ({name: pair[i] for name, pair in found.items()} for i in (0, 1))
    share = ratios(means, sizes, budget, exponent)
    assert all(0 <= ratio <= MOST * (1 + 1e-9) for ratio in share.values())
    spent = sum(share[name] * sizes[name] for name in sizes)
    assert spent == pytest.approx(budget * sum(sizes.values()), rel=1e-6, abs=1e-9)
    ordered = sorted(means, key=means.get)
    assert all(share[a] <= share[b] * (1 + 1e-9) for a, b in pairwise(ordered))


def test_exponent_zero_is_the_uniform_ratio() -> None:
    assert ratios({"a": 1.0, "b": 9.0}, {"a": 10, "b": 1000}, 0.004, 0.0) == pytest.approx({"a": 0.004, "b": 0.004})


def test_water_filling_caps_a_greedy_layer() -> None:
    share = ratios({"a": 1.0, "b": 1e9}, {"a": 100, "b": 100}, 0.03, 2.0)
    assert share == pytest.approx({"a": 0.01, "b": MOST})


@pytest.mark.parametrize("budget", [-0.1, 0.06])
def test_a_budget_that_can_not_be_spent_is_refused(budget: float) -> None:
    with pytest.raises(ValueError, match=r"outside 0 % to 5 %"):
        ratios({"a": 1.0}, {"a": 1}, budget, 1.0)


def test_the_exponent_with_the_least_loss_wins() -> None:
    weights = {"a": torch.randn(40, 50), "b": torch.randn(40, 50)}
    losses = {0.5: 1.0, 1.0: 0.5, 1.5: 0.5}
    order = iter(EXPONENTS)
    masks, tried = adaptive(weights, {"a": 1.0, "b": 3.0}, 0.02, lambda _: losses.get(next(order), 2.0))
    assert tried == {exponent: losses.get(exponent, 2.0) for exponent in EXPONENTS}
    share = ratios({"a": 1.0, "b": 3.0}, {"a": 2000, "b": 2000}, 0.02, 1.0)
    assert {name: torch.equal(mask, largest(weights[name], share[name])) for name, mask in masks.items()} == {
        "a": True,
        "b": True,
    }


def test_the_quartile_rule_takes_what_lies_farthest_outside_in_units_of_the_range() -> None:
    spread, narrow = torch.randn(50, 100), 0.01 * torch.randn(50, 100)
    narrow[3, 7] = -1.0
    masks = beyond_quartiles({"spread": spread, "narrow": narrow}, 0.002)
    assert sum(int(mask.sum()) for mask in masks.values()) == 20
    assert bool(masks["narrow"][3, 7])

    def reach(weight: torch.Tensor) -> torch.Tensor:
        low, high = torch.quantile(weight, 0.25), torch.quantile(weight, 0.75)
        return torch.maximum(low - weight, weight - high) / (high - low)

    c = min(float(reach(weight)[masks[name]].min()) for name, weight in (("spread", spread), ("narrow", narrow)))
    for name, weight in (("spread", spread), ("narrow", narrow)):
        assert bool((reach(weight)[~masks[name]] < c * 1.01).all())
