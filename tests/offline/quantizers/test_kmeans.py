import pytest
import torch
from requant.quantizers import kmeans
from requant_kernels.scheme import WeightScheme


def naive_row(values: torch.Tensor, weights: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Lloyd's iterations to the end, one row, float64."""
    for _ in range(60):
        nearest = (values[:, None] - levels[None]).abs().argmin(1)
        for level in range(len(levels)):
            inside = nearest == level
            if float(weights[inside].sum()) > 0:
                levels[level] = (weights[inside] * values[inside]).sum() / weights[inside].sum()
    return levels


def loss(weight: torch.Tensor, levels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return ((weight[..., None] - levels[:, None]).square().amin(-1) * weights).sum(1)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_ends_where_lloyds_algorithm_can_not_improve(bits: int) -> None:
    weight, importance = torch.randn(3, 100), torch.rand(3, 100) ** 4
    dense = kmeans.quantize(
        weight, WeightScheme(bits, codebook=True), dtype=torch.float32, importance=importance, iterations=400
    )
    for row in range(3):
        again = naive_row(weight[row].double(), importance[row].double(), dense.codebook[row].double().clone())
        torch.testing.assert_close(dense.codebook[row], again.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_is_close_to_the_best_of_many_random_starts(bits: int) -> None:
    weight, importance = torch.randn(2, 600), torch.rand(2, 600)
    dense = kmeans.quantize(weight, WeightScheme(bits, codebook=True), dtype=torch.float32, importance=importance)
    found = loss(weight, dense.codebook, importance)
    for row in range(2):
        starts = [weight[row][torch.randperm(600)[: 2**bits]].double() for _ in range(6)]
        levels = torch.stack([naive_row(weight[row].double(), importance[row].double(), s) for s in starts]).float()
        best = min(loss(weight[row : row + 1], one[None], importance[row : row + 1]) for one in levels)
        assert float(found[row]) < 1.1 * float(best)


def test_excluded_entries_weigh_nothing_and_get_the_level_nearest_zero() -> None:
    weight, excluded = torch.randn(4, 96), torch.rand(4, 96) < 0.1
    scheme = WeightScheme(3, codebook=True)
    spiked = torch.where(excluded, torch.full_like(weight, 50.0), weight)
    dense = kmeans.quantize(spiked, scheme, dtype=torch.bfloat16, excluded=excluded)
    assert float(dense.codebook.float().abs().max()) < 10
    nearest_zero = dense.codebook.float().abs().amin(1, keepdim=True).expand_as(weight)
    torch.testing.assert_close(dense.dequantize()[excluded].abs(), nearest_zero[excluded])


def test_rows_without_any_importance_are_weighed_evenly() -> None:
    weight, scheme = torch.randn(3, 64), WeightScheme(2, codebook=True)
    without = kmeans.quantize(weight, scheme, dtype=torch.float32, importance=torch.zeros(3, 64))
    assert torch.equal(without.codebook, kmeans.quantize(weight, scheme, dtype=torch.float32).codebook)


def test_few_distinct_values_are_represented_exactly() -> None:
    weight = torch.tensor([[-1.0, 0.0, 0.5, 0.5] * 8, [2.0] * 32])
    dense = kmeans.quantize(weight, WeightScheme(2, codebook=True), dtype=torch.float32)
    assert torch.equal(dense.dequantize(), weight)
