"""What the compiler makes of the shipped tiles, emulated (tests/emulator): numbers, races, accesses out of bounds.

The interpreter runs a kernel's source, one program as a whole. Only here do warps, barriers, layouts, copies under way
and launches that overlap take part, and what Triton does wrong.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from requant_kernels import reference
from requant_kernels.dense_sparse.interface import LayerConfig
from requant_kernels.dense_sparse.triton import launch
from requant_kernels.dense_sparse.triton.implementation import Triton
from requant_kernels.dense_sparse.triton.table import Table, Tile, tables
from requant_kernels.dense_sparse.triton.variants import TARGETS
from requant_kernels.weight import DenseSparseWeight

from tests.emulator.driver import emulated
from tests.kernels.triton.cases import ONE, Case, check, run, weight_of


@dataclass(frozen=True)
class Shipped(Case):
    """With the table of ``gpu``, whose tile the tokens choose."""

    gpu: str = "h200"

    @property
    def table(self) -> Table:
        return tables()[self.gpu]


pytestmark = pytest.mark.usefixtures("poisoned")
ROWS, COLUMNS = 150, 640  # tails of tiles and of blocks
GRID = {
    **{f"{gpu}, {tokens} tokens": Shipped(tokens, ROWS, COLUMNS, 4, 128, gpu=gpu, sparse=0.01)
       for gpu in ("h200", "a100") for tokens in (1, 3, 16, 30, 60)},
    "h200, 100 tokens": Shipped(100, ROWS, COLUMNS, 4, 128),
    "h200, 100 tokens, dense only": Shipped(100, ROWS, 512, 4, 128, sparse="none"),
    "h200, 100 tokens, W3": Shipped(100, ROWS, 640, 3, 64, sparse=0.01),
    "h200, 200 tokens, W4 asymmetric": Shipped(200, ROWS, 640, 4, 64, symmetric=False, sparse=0.01),
    "h200, 300 tokens, W2, uneven rows": Shipped(300, 40, 640, 2, 128, sparse="uneven"),
    "h200, 150 tokens, W3, float16, dense only": Shipped(150, ROWS, 300, 3, sparse="none", dtype=torch.float16),
    "h200, decoded": Shipped(2050, 40, 384, 4, 128, sparse=0.01),
    "a100, decoded": Shipped(300, 40, 300, 3, gpu="a100"),
    "one token, W2 g32 asymmetric, 5 %": Shipped(1, ROWS, COLUMNS, 2, 32, symmetric=False, sparse=0.05),
    "one token, W3, uneven rows, float16": Shipped(1, ROWS, COLUMNS, 3, 64, sparse="uneven", dtype=torch.float16),
    "one token, crowded strip": Shipped(1, 48, 600, 4, sparse="strip"),
    "one token, codebook": Shipped(1, 40, 512, 3, codebook=True),
    "3 tokens, crowded strip": Shipped(3, 48, 600, 4, sparse="strip"),
    "8 tokens, W8 asymmetric": Shipped(8, ROWS, COLUMNS, 8, 32, symmetric=False),
    "8 tokens, uneven rows": Shipped(8, ROWS, COLUMNS, 4, 128, sparse="uneven"),
    "16 tokens, W3 asymmetric, uneven rows": Shipped(16, ROWS, COLUMNS, 3, 64, symmetric=False, sparse="uneven"),
    "16 tokens, dense only": Shipped(16, ROWS, COLUMNS, 4, 128, sparse="none"),
    "one token, wide": Shipped(1, 40, 2048, 4, 128),
    "one token, W8 asymmetric": Shipped(1, ROWS, 512, 8, 64, symmetric=False),
    "one token, W3 g128, float16": Shipped(1, ROWS, 1024, 3, 128, dtype=torch.float16, sparse=0.001),
    "one token, groups of 16, sm_80": Shipped(1, 40, 496, 4, 32, symmetric=False, cut=16, gpu="a100"),
    "one token, columns in odd number": Shipped(1, 40, 301, 2, sparse=0.01),
    "6 tokens": Shipped(6, ROWS, 512, 4, 128),
    "16 tokens, W3 asymmetric": Shipped(16, ROWS, 512, 3, 64, symmetric=False),
    "10 tokens, steps of zero, float16": Shipped(10, 40, 512, 4, 128, zero_steps=True, dtype=torch.float16),
    "60 tokens, W2 asymmetric, uneven rows": Shipped(60, ROWS, COLUMNS, 2, 32, symmetric=False, sparse="uneven"),
    "60 tokens, W8": Shipped(60, ROWS, 320, 8, 64),
    "60 tokens, dense only": Shipped(60, ROWS, 512, 4, 128, sparse="none"),
    "60 tokens, row full": Shipped(60, ROWS, COLUMNS, 3, sparse="row", dtype=torch.float16),
    "60 tokens, codebook": Shipped(60, 40, 512, 4, codebook=True),
}  # fmt: skip


@pytest.mark.parametrize("case", GRID.values(), ids=GRID.keys())
def test_compiled(case):
    with emulated(int(TARGETS[case.gpu][0])):
        check(case)


@pytest.mark.parametrize(
    "case", ["a100, 16 tokens", "a100, 60 tokens", "16 tokens, W3 asymmetric", "60 tokens, codebook"]
)
def test_columns_in_fours(case, monkeypatch):
    """As Triton before 3.8 wants them where ``mma`` multiplies: the same with any."""
    monkeypatch.setattr(launch, "wants_fours", lambda tokens, target: True)
    with emulated(int(TARGETS[GRID[case].gpu][0])):
        check(GRID[case])


@pytest.mark.parametrize("case", ["a100, 16 tokens", "h200, 200 tokens, W4 asymmetric", "60 tokens, codebook"])
def test_products_added_apart(case, monkeypatch):
    """As Triton before 3.9 wants them for ``tcgen05``, which is not emulated: the same with any."""
    monkeypatch.setattr(launch, "wants_apart", lambda target: True)
    with emulated(int(TARGETS[GRID[case].gpu][0])):
        check(GRID[case])


@pytest.mark.parametrize(
    "case", ["h200, 100 tokens", "h200, 200 tokens, W4 asymmetric", "h200, 300 tokens, W2, uneven rows"]
)
def test_products_beside_each_other(case, monkeypatch):
    """As Triton 3.8 wants them of more than 128 tokens: the same with any, one tile or two below each other."""
    monkeypatch.setattr(launch, "wants_sides", lambda tokens: 2)
    with emulated(90):
        check(GRID[case])


@pytest.mark.parametrize("tokens", [1, 16, 60, 200])
def test_the_order_of_programs_and_warps_does_not_matter(tokens):
    """Columns are split among programs here, whichever of them is last: the same bits."""
    case = Shipped(tokens, 40, 1024, 4, 128)
    results = []
    for order in range(3):
        with emulated(90, order):
            results.append(run(case)[0])
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("tokens", [1, 6, 60, 140])
def test_a_layer_waits_for_the_one_before(tokens):
    """Launches overlap on an H200: what a layer reads before it waits must not be what the one before it writes."""
    case = Shipped(tokens, 256, 256, 4, 128, sparse=0.02, bias=False)
    weight, implementation = weight_of(case), Triton(case.table)
    prepared = implementation.prepare(weight, LayerConfig.of(weight, case.dtype, torch.device("cpu")))
    x = torch.randn(tokens, 256).to(case.dtype)
    dense = reference.dequantize(weight).to(case.dtype)
    with emulated(90):
        y, z = x, x
        for _ in range(2):
            y = implementation.apply(y, list(prepared.tensors.values()), None, 256, list(prepared.meta))
            z = z @ dense.T
    assert (y - z).double().norm() <= 0.01 * z.double().norm()


def one_token(x: torch.Tensor, weight: DenseSparseWeight) -> torch.Tensor:
    implementation = Triton(tables()["h200"])
    prepared = implementation.prepare(weight, LayerConfig.of(weight, x.dtype, torch.device("cpu")))
    with emulated(90):
        return implementation.apply(x, list(prepared.tensors.values()), None, weight.out_features, list(prepared.meta))


def test_one_tokens_digits_leave_small_x_beside_large_ones():
    """x in fixed point is right to 2**-22 of the largest of its block, whose weights are zero here."""
    weight = weight_of(Case(1, 32, 512, 4, 128, sparse="none"))
    x = torch.randn(1, 512)
    assert weight.scale is not None
    large = replace(weight, scale=weight.scale.clone())
    large.scale[:, 0] = 0
    x[:, 5] = 2.0**12
    x[:, :128] = torch.where(torch.arange(128) == 5, x[:, :128], 0)
    x = x.to(torch.bfloat16)
    expected = x.double() @ reference.dequantize(large).double().T
    assert (one_token(x, large) - expected).norm() <= 2**-8 * expected.norm()


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_one_tokens_x_that_is_not_finite_is_seen(value, dtype):
    x = torch.ones(1, 512, dtype=dtype)
    x[:, 300] = value
    assert one_token(x, weight_of(Case(1, 16, 512, 4, 128, dtype=dtype))).isnan().all()


def test_it_sees_what_went_wrong_on_an_h200(monkeypatch):
    """Batches of a product beyond the number of warps are lost, with one token: so a tile has as many warps. When
    Triton computes the sums, this fails."""
    case = Case(1, 128, 1024, 4, codebook=True, sparse="none", tile=ONE)
    with emulated(90):
        check(case)
    monkeypatch.setattr(Tile, "warps", 2)
    with emulated(90), pytest.raises(AssertionError, match="off by"):
        check(case)
