"""The sparse product on a CPU against float64."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from requant_kernels.dense_sparse import cpu_sparse
from requant_kernels.sparse import SparsePart


def operands(rows: int, columns: int, tokens: int, density: float) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(rows + columns + tokens)
    mask = torch.rand(rows, columns, generator=generator) < density
    part = SparsePart.from_mask(torch.randn(rows, columns, generator=generator).bfloat16(), mask)
    y = torch.randn(tokens, rows, generator=generator).bfloat16()
    x = torch.randn(tokens, columns, generator=generator).bfloat16()
    return y, x, part.row_offsets, part.columns.to(torch.int32), part.values.float()


def exact(y, x, row_offsets, columns, values) -> torch.Tensor:
    dense = torch.zeros(y.shape[1], x.shape[1], dtype=torch.float64)
    rows = torch.repeat_interleave(torch.arange(y.shape[1]), row_offsets.diff())
    dense[rows, columns.long()] = values.double()
    return y.double() + x.double() @ dense.T


@given(
    rows=st.integers(1, 90),
    columns=st.integers(1, 90),
    tokens=st.sampled_from((1, 2, 7)),
    density=st.sampled_from((0.0, 0.02, 0.5, 1.0)),
)
def test_sums_are_rounded_once(rows, columns, tokens, density):
    y, *sparse = operands(rows, columns, tokens, density)
    expected = exact(y, *sparse)
    cpu_sparse.add_sparse(y, *sparse)
    # half a step of bf16, and what fp32 loses on the way
    assert ((y.double() - expected).abs() <= 0.501 * 2**-7 * expected.abs() + 1e-5).all()


def test_ties_go_to_even_and_nothing_finite_or_not_is_lost():
    y = torch.tensor([[1.0, 1.0, 1.0, float("inf"), float("nan"), 1.0]], dtype=torch.bfloat16)
    ulp = 2.0**-7
    values = torch.tensor([ulp / 2, 1.5 * ulp, -ulp / 4, 1.0, 1.0, float("nan")])
    offsets, columns = torch.arange(7, dtype=torch.int32), torch.zeros(6, dtype=torch.int32)
    cpu_sparse.add_sparse(y, torch.ones(1, 1, dtype=torch.bfloat16), offsets, columns, values)
    expected = torch.tensor([[1.0, 1 + 2 * ulp, 1.0, float("inf"), float("nan"), float("nan")]])
    torch.testing.assert_close(y.float(), expected, rtol=0, atol=0, equal_nan=True)
