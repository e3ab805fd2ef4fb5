import pytest
import torch
from requant.quantizers import clip, gptq
from requant_kernels.rounding import rtn
from requant_kernels.rounding.grid import Grid
from requant_kernels.scheme import WeightScheme


def inputs(columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    return torch.randn(400, columns, generator=generator) @ mixing


def range_grid(weight: torch.Tensor, scheme: WeightScheme) -> Grid:
    grouped = weight.reshape(len(weight), scheme.groups(weight.shape[1]), -1)
    return Grid.spanning(grouped.amin(-1), grouped.amax(-1), scheme, torch.bfloat16)


def naive(
    weight: torch.Tensor, grid: Grid, moment: torch.Tensor, excluded: torch.Tensor, damping: float
) -> torch.Tensor:
    """Optimal brain quantization in falling order of E[x^2]: invert, round one column, delete it, repeat; float64."""
    left, hessian = weight.double(), moment.double()
    hessian = hessian + torch.eye(len(hessian)) * damping * hessian.diagonal().mean()
    done, remaining = torch.empty_like(left), hessian.diagonal().argsort(descending=True).tolist()
    left = left.clone()
    while remaining:
        inverse = torch.linalg.inv(hessian[remaining][:, remaining])
        j = remaining[0]
        rounded = grid.nearest(left.float()).double()[:, j]
        done[:, j] = torch.where(excluded[:, j], left[:, j], rounded)
        left[:, remaining] -= ((left[:, j] - done[:, j]) / inverse[0, 0])[:, None] * inverse[0]
        remaining = remaining[1:]
    return done.float()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group", [-1, 32])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_equals_optimal_brain_quantization(bits: int, group: int, symmetric: bool) -> None:
    weight, x = torch.randn(6, 160), inputs(160)
    excluded, moment = torch.rand(6, 160) < 0.05, x.T @ x / len(x)
    grid = range_grid(weight.masked_fill(excluded, 0), WeightScheme(bits, group, symmetric))
    dense, target = gptq.quantize(weight, grid, moment, excluded=excluded)
    result = torch.where(excluded, target, dense.dequantize())
    torch.testing.assert_close(result, naive(weight, grid, moment, excluded, 0.01), atol=1e-4, rtol=1e-4)
    assert bool((dense.dequantize()[excluded] == 0).all())


def test_works_on_a_codebook() -> None:
    weight, x = torch.randn(6, 64), inputs(64)
    grid = Grid(WeightScheme(2, codebook=True), codebook=torch.randn(6, 4))
    dense, _ = gptq.quantize(weight, grid, x.T @ x / len(x), act_order=False)
    error = ((dense.dequantize() - weight) @ x.T).norm()
    assert float(error) < float(((grid.nearest(weight) - weight) @ x.T).norm())


@pytest.mark.parametrize("act_order", [True, False])
def test_beats_rounding_on_the_layers_output(act_order: bool) -> None:
    weight, x = torch.randn(16, 128), inputs(128)
    scheme, moment = WeightScheme(3, 64, False), x.T @ x / len(x)
    low, high = clip.search(weight, scheme, dtype=torch.bfloat16, importance=moment.diagonal())
    grid = Grid.spanning(low, high, scheme, torch.bfloat16)
    dense, _ = gptq.quantize(weight, grid, moment, act_order=act_order)
    nearest = rtn.quantize(weight, scheme, dtype=torch.bfloat16).dequantize()
    assert float(((dense.dequantize() - weight) @ x.T).norm()) < 0.8 * float(((nearest - weight) @ x.T).norm())


def test_excluding_entries_lowers_the_error() -> None:
    weight, x = torch.randn(16, 64), inputs(64)
    excluded, moment = torch.rand(16, 64) < 0.05, x.T @ x / len(x)
    scheme = WeightScheme(2, -1, False)
    dense, target = gptq.quantize(
        weight, range_grid(weight.masked_fill(excluded, 0), scheme), moment, excluded=excluded
    )
    with_sparse = torch.where(excluded, target, dense.dequantize())
    without, _ = gptq.quantize(weight, range_grid(weight, scheme), moment)
    assert float(((with_sparse - weight) @ x.T).norm()) < float(((without.dequantize() - weight) @ x.T).norm())


def test_dead_inputs_are_harmless() -> None:
    weight, x = torch.randn(4, 64), inputs(64)
    x[:, 3] = 0
    dense, target = gptq.quantize(weight, range_grid(weight, WeightScheme(4, -1, False)), x.T @ x / len(x))
    assert bool(target.isfinite().all())
    assert bool(dense.dequantize().isfinite().all())


def test_a_moment_that_is_none_is_refused() -> None:
    weight = torch.randn(4, 64)
    with pytest.raises(ValueError, match="not positive definite"):
        gptq.quantize(weight, range_grid(weight, WeightScheme(4)), -torch.eye(64))
