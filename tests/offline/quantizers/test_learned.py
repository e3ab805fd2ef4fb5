import pytest
import torch
from requant.quantizers import clip
from requant.quantizers.learned import LearnedRounding
from requant_kernels.rounding.grid import Grid
from requant_kernels.scheme import WeightScheme


def rounding_of(weight: torch.Tensor, scheme: WeightScheme, excluded: torch.Tensor | None = None) -> LearnedRounding:
    low, high = clip.search(weight, scheme, dtype=torch.bfloat16, excluded=excluded)
    return LearnedRounding(weight, low, high, scheme, dtype=torch.bfloat16, excluded=excluded)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_starts_as_rounding_on_searched_ranges(bits: int, symmetric: bool) -> None:
    weight, scheme = torch.randn(6, 96), WeightScheme(bits, 32, symmetric)
    low, high = clip.search(weight, scheme, dtype=torch.bfloat16)
    expected = Grid.spanning(low, high, scheme, torch.bfloat16).nearest(weight)
    torch.testing.assert_close(rounding_of(weight, scheme).forward(), expected)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_what_is_trained_is_what_is_stored(bits: int, symmetric: bool) -> None:
    weight, excluded = torch.randn(6, 96), torch.rand(6, 96) < 0.05
    rounding = rounding_of(weight, WeightScheme(bits, 32, symmetric), excluded)
    with torch.no_grad():
        rounding.offset.uniform_(-0.5, 0.5)
        rounding.low_factor.uniform_(0.3, 1)
        rounding.high_factor.uniform_(0.3, 1)
        rounding.values.add_(0.01)
    dense, target = rounding.quantized()
    stored = torch.where(excluded, target, dense.dequantize())
    torch.testing.assert_close(rounding.forward(), stored, atol=1e-6, rtol=1e-6)
    assert bool((dense.dequantize()[excluded] == 0).all())


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("sign", [1, -1])
def test_groups_of_one_sign_are_trained_on_the_grid_that_is_stored(symmetric: bool, sign: int) -> None:
    weight = sign * (torch.rand(6, 96, generator=torch.Generator().manual_seed(1)) + 0.5)
    rounding = rounding_of(weight, WeightScheme(3, 32, symmetric))
    assert torch.equal(rounding.forward(), rounding.quantized()[0].dequantize())
    assert float((rounding.forward().detach() - weight).abs().max()) < 0.35


def test_training_finds_roundings_that_compensate() -> None:
    weight, x = torch.randn(8, 64), torch.randn(200, 64) @ (torch.eye(64) + torch.randn(64, 64) / 8)
    rounding = rounding_of(weight, WeightScheme(2, 32, False))

    def loss() -> torch.Tensor:
        return ((rounding() - weight) @ x.T).square().mean()

    before = float(loss().detach())
    optimizer = torch.optim.Adam(rounding.parameters(), lr=0.02)
    for step in range(100):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 100)
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        rounding.project()
    assert float(loss().detach()) < 0.8 * before


def test_gradients_reach_every_parameter() -> None:
    weight, excluded = torch.randn(4, 64), torch.rand(4, 64) < 0.1
    rounding = rounding_of(weight, WeightScheme(3, 32, False), excluded)
    (rounding() * torch.randn(4, 64)).sum().backward()
    for name, parameter in rounding.named_parameters():
        assert parameter.grad is not None, name
        assert bool((parameter.grad != 0).any()), name


def test_project_keeps_a_rounding_within_one_step() -> None:
    rounding = rounding_of(torch.randn(4, 64), WeightScheme(3, 32, False))
    with torch.no_grad():
        for parameter in rounding.parameters():
            parameter.add_(torch.randn_like(parameter))
    rounding.project()
    assert float(rounding.offset.detach().abs().max()) <= 0.5
    assert 0 < float(rounding.low_factor.detach().min()) <= float(rounding.low_factor.detach().max()) <= 2
