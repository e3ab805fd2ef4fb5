import pytest
import torch
from requant.quantizers import kmeans
from requant.quantizers.rescaled import Rescaled
from requant_kernels.rounding import rtn
from requant_kernels.scheme import WeightScheme

SCHEMES = [WeightScheme(2, 32, False), WeightScheme(3, -1, True), WeightScheme(2, codebook=True)]


def rescaled(scheme: WeightScheme, excluded: torch.Tensor | None = None) -> tuple[torch.Tensor, Rescaled]:
    weight = torch.randn(6, 96, generator=torch.Generator().manual_seed(0))
    quantize = kmeans.quantize if scheme.codebook else rtn.quantize
    return weight, Rescaled(quantize(weight, scheme, dtype=torch.bfloat16, excluded=excluded), weight, excluded)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_it_starts_as_what_it_was_given(scheme: WeightScheme) -> None:
    _, rounding = rescaled(scheme)
    assert torch.equal(rounding.forward(), rounding.dense.dequantize())


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_what_is_trained_is_what_is_stored(scheme: WeightScheme) -> None:
    excluded = torch.rand(6, 96, generator=torch.Generator().manual_seed(1)) < 0.05
    _, rounding = rescaled(scheme, excluded)
    codes = rounding.dense.codes.clone()
    with torch.no_grad():
        rounding.shift.uniform_(-0.5, 0.5)
        rounding.values.add_(0.01)
    dense, target = rounding.quantized()
    assert torch.equal(dense.codes, codes)
    assert not torch.equal(dense.dequantize(), rounding.dense.dequantize())
    assert torch.equal(rounding.forward(), torch.where(excluded, target, dense.dequantize()))


def test_the_mean_step_is_the_distance_between_levels() -> None:
    _, grid = rescaled(WeightScheme(2, 32, False))
    assert grid.mean_step == pytest.approx(float(grid.dense.scale.float().mean()))
    _, codebook = rescaled(WeightScheme(2, codebook=True))
    distances = codebook.dense.codebook.float().sort(1).values.diff(dim=1)
    assert codebook.mean_step == pytest.approx(float(distances.mean()))


def test_steps_learn_to_fit() -> None:
    weight, rounding = rescaled(WeightScheme(2, 32, False))
    optimizer = torch.optim.Adam(rounding.parameters(), lr=0.02)
    errors = []
    for _ in range(60):
        optimizer.zero_grad()
        error = (rounding() - weight).square().mean()
        error.backward()
        optimizer.step()
        rounding.project()
        errors.append(float(error.detach()))
    # the best a fixed set of codes allows, group by group, by least squares
    zeros = rounding.dense.zero_points[..., None].float()
    levels = rounding.dense.codes.view(6, 3, 32).float() - zeros
    best = (levels * weight.view(6, 3, 32)).sum(-1) / levels.square().sum(-1)
    least = float((levels * best[..., None] - weight.view(6, 3, 32)).square().mean())
    assert least <= errors[-1] < least + 0.1 * (errors[0] - least)


def test_a_codebook_learns_to_fit() -> None:
    weight, rounding = rescaled(WeightScheme(2, codebook=True))
    with torch.no_grad():
        rounding.dense.codebook.mul_(1.3)
    optimizer = torch.optim.Adam([rounding.shift], lr=0.02)
    for _ in range(80):
        optimizer.zero_grad()
        error = (rounding() - weight).square().mean()
        error.backward()
        optimizer.step()
    codes = torch.nn.functional.one_hot(rounding.dense.codes.long(), 4).float()
    means = (codes * weight[..., None]).sum(1) / codes.sum(1)  # what is best for codes as they are
    torch.testing.assert_close(rounding.quantized()[0].codebook.float(), means, atol=0.02, rtol=0)
