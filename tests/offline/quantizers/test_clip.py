import pytest
import torch
from requant.quantizers import clip
from requant_kernels.rounding import rtn
from requant_kernels.rounding.grid import Grid
from requant_kernels.scheme import WeightScheme


def searched(weight: torch.Tensor, scheme: WeightScheme, **options: torch.Tensor) -> Grid:
    return Grid.spanning(*clip.search(weight, scheme, dtype=torch.float32, **options), scheme, torch.float32)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_finds_the_best_shrunken_range_of_every_group(bits: int, symmetric: bool) -> None:
    weight, importance = torch.randn(3, 64), torch.rand(64)
    scheme = WeightScheme(bits, 32, symmetric)
    found = searched(weight, scheme, importance=importance).nearest(weight)
    for row in range(3):
        for start in (0, 32):
            group = weight[row : row + 1, start : start + 32]
            one = WeightScheme(bits, -1, symmetric)
            errors = [
                ((grid.nearest(group) - group).square() * importance[start : start + 32]).sum()
                for shrink in clip.SHRINK
                for grid in [
                    Grid.spanning(shrink * group.amin(1, True), shrink * group.amax(1, True), one, torch.float32)
                ]
            ]
            error = ((found[row, start : start + 32] - group).square() * importance[start : start + 32]).sum()
            torch.testing.assert_close(error, min(errors))


def test_never_worse_than_round_to_nearest() -> None:
    weight, scheme = torch.randn(8, 128) ** 3, WeightScheme(2, 64, False)
    nearest = rtn.quantize(weight, scheme, dtype=torch.float32).dequantize()
    assert float((searched(weight, scheme).nearest(weight) - weight).norm()) < float((nearest - weight).norm())


def test_excluded_entries_neither_widen_nor_count() -> None:
    weight, scheme = torch.randn(4, 64), WeightScheme(3, -1, False)
    spiked, excluded = weight.clone(), torch.zeros(4, 64, dtype=torch.bool)
    spiked[:, 5], excluded[:, 5] = 100.0, True
    same = searched(weight.masked_fill(excluded, 0), scheme)
    assert torch.equal(searched(spiked, scheme, excluded=excluded).scale, same.scale)
