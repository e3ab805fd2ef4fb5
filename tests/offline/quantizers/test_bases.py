"""What every base hands on, while a run goes on, is what a file will hold."""

import pytest
import torch
from requant.quantizers.bases import BASES, FixedRounding, Task
from requant.statistics import InputStatistics
from requant_kernels.reference import dequantize
from requant_kernels.rounding import rtn
from requant_kernels.rounding.dense import attach_residual
from requant_kernels.scheme import WeightScheme

GENERATOR = torch.Generator().manual_seed(0)
WEIGHT, X = torch.randn(16, 128, generator=GENERATOR), torch.randn(300, 128, generator=GENERATOR)
INPUTS = InputStatistics(X.T @ X, X.abs().sum(0), len(X))
EXCLUDED = torch.rand(16, 128, generator=GENERATOR) < 0.05
UNIFORM = WeightScheme(3, 32, symmetric=False)


def stored(rounding, dtype: torch.dtype) -> torch.Tensor:
    dense, target = rounding.quantized()
    return dequantize(attach_residual(target, dense, EXCLUDED, dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("base", BASES)
def test_a_rounding_computes_with_what_is_stored(base: str, dtype: torch.dtype) -> None:
    scheme = WeightScheme(3, codebook=True) if base == "kmeans" else UNIFORM
    rounding = BASES[base](Task(WEIGHT, scheme, dtype, INPUTS, EXCLUDED))
    with torch.no_grad():
        assert torch.equal(rounding(), stored(rounding, dtype))


def test_so_does_one_whose_entries_were_restored_afterwards() -> None:
    rounding = FixedRounding(rtn.quantize(WEIGHT, UNIFORM, dtype=torch.bfloat16), WEIGHT, EXCLUDED)
    assert torch.equal(rounding(), stored(rounding, torch.bfloat16))
