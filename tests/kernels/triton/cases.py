"""One application of a layer, described by values, run by the kernels and judged against float64.

Runs in an interpreter process without a GPU (conftest.py) or on a device, in this process.
"""

from dataclasses import dataclass, replace

import torch
from requant_kernels import reference
from requant_kernels.dense_sparse.interface import LayerConfig
from requant_kernels.dense_sparse.triton.implementation import Triton
from requant_kernels.dense_sparse.triton.table import Decode, Table, Tile
from requant_kernels.scheme import LayerScheme, SparseScheme, WeightScheme
from requant_kernels.sparse import SparsePart
from requant_kernels.weight import DenseSparseWeight

from tests.kernels.strategies import random_weight

ONE = Tile("one", up_to=1, tokens=1, strips=1, stages=2, programs=1, k_warps=4)
FEW = Tile("middle", up_to=10_000, tokens=16, strips=4, stages=2, programs=1)
MIDDLE = replace(FEW, tokens=32, strips=8)
DECODE = Decode(strips=4, k_warps=2, stages=2, workspace_mib=0)


@dataclass(frozen=True)
class Case:
    """``group`` of the scheme; ``cut`` columns are sliced off, which refines groups. ``sparse``: a density, or
    one of "none", "one", "row" (a full row), "strip" (one crowded strip), "uneven" (rows of 5 % differ as those of
    trained models)."""

    tokens: int
    rows: int
    columns: int
    bits: int = 4
    group: int = -1
    symmetric: bool = True
    codebook: bool = False
    cut: int = 0
    dtype: torch.dtype = torch.bfloat16
    sparse: float | str = 0.02
    bias: bool = True
    zero_steps: bool = False  # of every third group
    tile: Tile | None = FEW  # None: decode and multiply

    @property
    def table(self) -> Table:
        return Table((), "test", (self.tile,) if self.tile else (), DECODE)


def entries(case: Case) -> torch.Tensor:
    """bool [rows, cut + columns]: where the sparse part has entries."""
    mask = torch.zeros(case.rows, case.cut + case.columns, dtype=torch.bool)
    if isinstance(case.sparse, float):
        mask = torch.rand(mask.shape) < case.sparse
    elif case.sparse == "uneven":
        mask = torch.rand(mask.shape) < 0.05 * torch.exp(1.2 * torch.randn(case.rows, 1) - 0.72)
    elif case.sparse == "one":
        mask[-1, -1] = True
    elif case.sparse == "row":
        mask[case.rows // 2] = True
    elif case.sparse == "strip":
        mask[16:32] = True
        mask[-1, 0] = True
    return mask


def weight_of(case: Case) -> DenseSparseWeight:
    scheme = LayerScheme(WeightScheme(case.bits, case.group, case.symmetric, case.codebook), None)
    torch.manual_seed(case.tokens + case.rows + case.columns)
    weight = random_weight(scheme, (case.rows, case.cut + case.columns), dtype=case.dtype)
    if case.zero_steps:
        assert weight.scale is not None
        weight.scale.view(-1)[::3] = 0
    if case.sparse != "none":
        mask = entries(case)
        residual = SparsePart.from_mask(torch.randn(mask.shape).to(case.dtype), mask)
        weight = replace(weight, scheme=replace(scheme, sparse=SparseScheme()), sparse=residual)
    return weight.take_columns(case.cut, case.cut + case.columns)


def run(case: Case, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, expected in float64, the sum of absolute products, the root of the sum of their squares), all [tokens, rows]
    on the CPU."""
    weight = weight_of(case)
    x = torch.randn(case.tokens, weight.in_features).to(case.dtype)
    bias = torch.randn(case.rows).to(case.dtype) if case.bias else None
    implementation = Triton(case.table)
    prepared = implementation.prepare(weight, LayerConfig.of(weight, case.dtype, torch.device(device)))
    arguments = (None if bias is None else bias.to(device), case.rows, list(prepared.meta))
    y = implementation.apply(x.to(device), list(prepared.tensors.values()), *arguments).cpu()
    assert not prepared.tensors["arrived"].any(), "the count of shares is not back at zero"
    dense = reference.dequantize(weight).double()
    shift = torch.zeros(case.rows).double() if bias is None else bias.double()
    x = x.double()
    squares = (x**2 @ dense.T**2 + shift**2).sqrt()
    return y, x @ dense.T + shift, x.abs() @ dense.abs().T + shift.abs(), squares


def check(case: Case, device: str = "cpu") -> None:
    """Raises AssertionError unless every output is within its dtype's rounding of what is to be summed."""
    y, expected, magnitude, squares = run(case, device)
    assert y.dtype == case.dtype, y.dtype
    assert not y.isnan().any(), f"{int(y.isnan().sum())} of {y.numel()} outputs were not written"
    eps = torch.finfo(case.dtype).eps
    error = (y.double() - expected).abs()
    assert (error <= eps * magnitude + 1e-6).all(), f"off by {float((error / magnitude).max() / eps):.2f} eps"
    size = torch.maximum(expected.norm(), squares.norm())  # of few outputs the sums may be near zero by chance
    assert error.norm() <= 0.5 * eps * size + 1e-6, f"{float(error.norm() / size / eps):.2f} eps"
