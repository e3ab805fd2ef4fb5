"""No import needs triton or a GPU; layers are warmed up once; graphs replay the same bits."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from requant_kernels.dense_sparse.interface import LayerConfig
from requant_kernels.dense_sparse.triton import IMPLEMENTATION
from requant_kernels.scheme import LayerScheme, SparseScheme, WeightScheme

from tests.kernels.strategies import random_weight
from tests.kernels.triton.cases import FEW, MIDDLE, Case


def test_importing_needs_no_triton():
    script = "import sys; sys.modules['triton'] = None; from requant_kernels.dense_sparse.triton import IMPLEMENTATION"
    subprocess.run([sys.executable, "-c", script], check=True)


def warmed_up() -> tuple[int, int]:
    from requant_kernels.dense_sparse.triton.implementation import Triton
    from requant_kernels.dense_sparse.triton.table import Table

    case = Case(1, 1, 1)
    weight = random_weight(LayerScheme(WeightScheme(2, 32)), (16, 32))
    prepared = Triton().prepare(weight, LayerConfig.of(weight, torch.bfloat16, torch.device("cpu")))
    calls = 0

    class Counted(Triton):
        def apply(self, *arguments: Any) -> torch.Tensor:
            nonlocal calls
            calls += 1
            return super().apply(*arguments)

    implementation = Counted(Table((), "test", (FEW, MIDDLE), case.table.decode))
    cpu = torch.device("cpu")
    implementation.warm_up(prepared, torch.bfloat16, cpu, limit=40, biased=[False])
    once = calls
    implementation.warm_up(prepared, torch.bfloat16, cpu, limit=40, biased=[False, True])
    return once, calls


def test_layers_of_one_kind_are_warmed_up_once_for_each_kind_of_bias(interpreted):
    once, twice = interpreted(warmed_up)
    assert (once, twice) == (3, 6)  # one few, one and two middle tiles up to 40 tokens; then with a bias, too


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 16, 64, 300])
def test_the_same_input_gives_the_same_bits_in_a_graph_too(tokens):
    device = torch.device("cuda")
    weight = random_weight(LayerScheme(WeightScheme(4, 128), SparseScheme()), (512, 4096))
    prepared = IMPLEMENTATION.prepare(weight, LayerConfig.of(weight, torch.bfloat16, device))
    x = torch.randn(tokens, 4096, dtype=torch.bfloat16, device=device)

    def apply() -> torch.Tensor:
        return IMPLEMENTATION.apply(x, list(prepared.tensors.values()), None, 512, list(prepared.meta))

    first = apply()
    assert all(torch.equal(first, apply()) for _ in range(5))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = apply()
    for _ in range(5):
        captured.fill_(float("nan"))
        graph.replay()
        assert torch.equal(first, captured)
