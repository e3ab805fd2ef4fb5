import pytest
import torch
from requant_kernels.rounding.grid import Grid
from requant_kernels.scheme import WeightScheme


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_values_are_what_the_reference_decodes(bits: int, symmetric: bool) -> None:
    weight = torch.randn(5, 96)
    grouped = weight.view(5, 3, 32)
    scheme = WeightScheme(bits, 32, symmetric)
    grid = Grid.spanning(grouped.amin(-1), grouped.amax(-1), scheme, torch.bfloat16)
    codes = grid.codes(weight)
    assert torch.equal(grid.values(codes), grid.dense(codes).dequantize())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_codebook_in_any_order_gives_the_nearest_level(bits: int) -> None:
    weight = torch.randn(6, 64)
    grid = Grid(WeightScheme(bits, codebook=True), codebook=torch.randn(6, 2**bits))
    distance = (weight[..., None] - grid.codebook[:, None, :]).abs()
    torch.testing.assert_close((weight - grid.nearest(weight)).abs(), distance.amin(-1))
    assert torch.equal(grid.values(grid.codes(weight)), grid.dense(grid.codes(weight)).dequantize())


def test_columns_of_a_grid_round_like_the_whole() -> None:
    weight, index = torch.randn(4, 64), torch.tensor([63, 0, 33])
    grouped = weight.view(4, 2, 32)
    grid = Grid.spanning(grouped.amin(-1), grouped.amax(-1), WeightScheme(3, 32, False), torch.float32)
    assert torch.equal(grid.columns(index, 32).nearest(weight[:, index]), grid.nearest(weight)[:, index])
