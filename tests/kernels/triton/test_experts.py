"""Routed experts as one stacked layer: against the reference that runs them one after another, in the interpreter and
as the compiler makes them, and the blocks of pairs that tokens are sorted into."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from requant_kernels import reference
from requant_kernels.dense_sparse.triton.experts import RoutedExperts
from requant_kernels.dense_sparse.triton.table import tables
from requant_kernels.dense_sparse.triton.variants import TARGETS
from requant_kernels.experts import Expert, run_experts
from requant_kernels.scheme import LayerScheme, SparseScheme, WeightScheme
from requant_kernels.sparse import SparsePart
from requant_kernels.weight import DenseSparseWeight

from tests.emulator.driver import emulated
from tests.kernels.strategies import random_weight


@dataclass(frozen=True)
class Case:
    tokens: int
    experts: int = 4
    top: int = 2
    hidden: int = 192
    inner: int = 72
    bits: int = 4
    group: int = 64
    symmetric: bool = True
    codebook: bool = False
    density: float = 0.02
    crowded: bool = False  # rows 16 to 23 of an expert are full
    dtype: torch.dtype = torch.bfloat16
    gpu: str = "h200"

    def weights(self, rows: int, columns: int, seed: int) -> list[DenseSparseWeight]:
        group = -1 if self.codebook or columns % self.group else self.group
        scheme = LayerScheme(
            WeightScheme(self.bits, group, self.symmetric, self.codebook), SparseScheme() if self.density else None
        )
        weights = [
            random_weight(scheme, (rows, columns), density=self.density, dtype=self.dtype, seed=seed + expert)
            for expert in range(self.experts)
        ]
        if self.crowded:
            entries = torch.zeros(rows, columns, dtype=torch.bool)
            entries[16:24] = True
            full = SparsePart.from_mask(torch.randn(rows, columns).to(self.dtype), entries)
            weights[-1] = replace(weights[-1], sparse=full)
        return weights


def ids_of(case: Case) -> torch.Tensor:
    """int32 [tokens, top], no expert twice; one expert gets every token, so that others get few or none."""
    scores = torch.rand(case.tokens, case.experts)
    scores[:, -1] += 1
    return scores.topk(case.top, 1).indices.int()


def run(case: Case, device: str = "cpu", overlap: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, expected), both [tokens, hidden] on the CPU; expected in float64. overlap: of launches, where the GPU's table
    has it; the interpreter knows no such thing."""
    torch.manual_seed(case.tokens)
    gate_up, down = case.weights(2 * case.inner, case.hidden, 0), case.weights(case.hidden, case.inner, 100)
    x = (torch.randn(case.tokens, case.hidden) * 2.0 ** (4 - case.bits)).to(case.dtype)  # h is in float16's range
    shares, ids = torch.rand(case.tokens, case.top), ids_of(case)
    table = tables()[case.gpu]
    table = replace(table, pdl=table.pdl and overlap)
    experts = RoutedExperts(gate_up, down, torch.device(device), table)
    y = experts(x.to(device), shares.to(device), ids.to(device)).cpu()

    def linear(weight: DenseSparseWeight):
        dense = reference.dequantize(weight).double()
        return lambda x: x @ dense.T

    exact = [Expert(linear(first), linear(second)) for first, second in zip(gate_up, down, strict=True)]
    return y, run_experts(x.double(), shares, ids, exact)


def check(case: Case, device: str = "cpu", overlap: bool = True) -> None:
    y, expected = run(case, device, overlap)
    assert y.dtype == case.dtype
    assert not y.isnan().any(), f"{int(y.isnan().sum())} of {y.numel()} outputs were not written"
    eps = torch.finfo(case.dtype).eps
    assert (y.double() - expected).norm() <= eps * expected.norm()  # x, h and y are rounded once each


CASES = {
    "one token": Case(1),
    "one token, default": Case(1, gpu="default", symmetric=False),
    "2 tokens, W3 asymmetric, float16": Case(2, bits=3, symmetric=False, dtype=torch.float16),
    "9 tokens of one expert, dense": Case(9, experts=2, top=1, density=0.0),
    "7 tokens, W8": Case(7, bits=8),
    "11 tokens, codebook": Case(11, bits=3, codebook=True),
    "20 tokens, W2": Case(20, bits=2, density=0.05),
    "40 tokens, a100": Case(40, gpu="a100"),
    "40 tokens, 20 of each": Case(40),
    "100 tokens, 50 of each, W3": Case(100, bits=3, symmetric=False, density=0.05),
    "150 tokens, 75 of each, float16": Case(150, hidden=256, dtype=torch.float16),
    "300 tokens, 150 of each": Case(300, bits=3),
    "40 tokens, a100, W2": Case(40, bits=2, gpu="a100"),
    "one token, crowded": Case(1, experts=2, crowded=True),
    "18 tokens, crowded": Case(18, crowded=True),
    "70 tokens, crowded": Case(70, crowded=True),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_interpreted(case, interpreted):
    interpreted(check, case, "cpu", False)


COMPILED = (
    "one token",
    "2 tokens, W3 asymmetric, float16",
    "20 tokens, W2",
    "40 tokens, a100",
    "40 tokens, 20 of each",
    "100 tokens, 50 of each, W3",
    "150 tokens, 75 of each, float16",
    "300 tokens, 150 of each",
    "one token, crowded",
    "18 tokens, crowded",
    "70 tokens, crowded",
)


@pytest.mark.parametrize("name", COMPILED)
def test_compiled(name, poisoned):
    case = CASES[name]
    with emulated(int(TARGETS[case.gpu][0])):
        check(case)


@st.composite
def cases(draw) -> Case:
    experts = draw(st.integers(1, 6))
    return Case(
        draw(st.sampled_from((1, 2, 5, 13, 40, 90))),
        experts=experts,
        top=draw(st.integers(1, min(experts, 3))),
        hidden=draw(st.sampled_from((64, 136, 192))),
        inner=draw(st.sampled_from((16, 40, 72))),
        bits=draw(st.sampled_from((2, 3, 4, 8))),
        symmetric=draw(st.booleans()),
        density=draw(st.sampled_from((0.0, 0.005, 0.1))),
        dtype=draw(st.sampled_from((torch.bfloat16, torch.float16))),
        gpu=draw(st.sampled_from(("h200", "a100"))),
    )


@given(case=cases())
@settings(max_examples=10)
def test_any_case_interpreted(interpreted, case):
    interpreted(check, case, "cpu", False)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_on_a_gpu(poisoned, case):
    check(case, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 7, 100])
def test_a_graph_replays_other_experts(tokens):
    """What a CUDA graph has recorded asks nobody which experts run."""
    case, device = Case(tokens), torch.device("cuda")
    experts = RoutedExperts(case.weights(144, 192, 0), case.weights(192, 72, 100), device)
    x, shares = torch.randn(tokens, 192, device=device).to(case.dtype), torch.rand(tokens, case.top, device=device)
    ids = ids_of(case).to(device)
    experts(x, shares, ids)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = experts(x, shares, ids)
    ids.copy_((ids + 1) % case.experts)
    graph.replay()
    assert torch.equal(y, experts(x, shares, ids))


def routed(ids: torch.Tensor, experts: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    from requant_kernels.dense_sparse.triton.route import align

    tile = replace(tables()["h200"].largest(tokens, 4, False), tokens=tokens)
    routing = align(ids, experts, tile, False)
    return routing.pairs, routing.chosen


@pytest.mark.parametrize(
    ("count", "top", "experts", "tokens"),
    [(1, 4, 7, 1), (1, 8, 128, 1), (33, 2, 8, 8), (40, 8, 60, 16)],
)
def test_each_pair_is_in_a_block_of_its_expert(count, top, experts, tokens, interpreted):
    torch.manual_seed(count)
    ids = torch.rand(count, experts).topk(top, 1).indices
    pairs, chosen = interpreted(routed, ids, experts, tokens)
    used = chosen >= 0
    assert not used[int(used.sum()) :].any(), "a block that is not used stands before one that is"
    found = pairs[used]
    there = found < count * top
    assert torch.equal(found[there].sort().values, torch.arange(count * top, dtype=torch.int32))
    owners = chosen[used][:, None].expand_as(found)[there]
    assert torch.equal(ids.flatten()[found[there].long()].int(), owners)
    assert (found[~there] == count * top).all()
    assert (there.sum(1) > 0).all()
