"""`vllm serve --jit-monitor-mode error`: after warm-up no number of tokens compiles anything.

vLLM's monitor itself watches, and Triton's own cache decides, on an emulated GPU that launches nothing.
"""

import pytest
import torch
from requant_kernels.dense_sparse import interface as dense_sparse
from requant_kernels.scheme import ActivationScheme, LayerScheme, SparseScheme, WeightScheme
from requant_kernels.w8a8 import interface as w8a8

pytest.importorskip("vllm", reason="vllm is not installed")
from vllm.utils import jit_monitor

from tests.emulator.driver import emulated
from tests.kernels.strategies import random_w8a8, random_weight

CPU = torch.device("cpu")
LIMIT = 2048  # tokens
TOKENS = (*range(1, 300), *range(300, LIMIT + 1, 97), LIMIT)


@pytest.fixture
def monitor(monkeypatch):
    from triton import knobs

    monkeypatch.setattr(jit_monitor, "HAS_TRITON", True)
    monkeypatch.setattr(jit_monitor, "_active", False)
    monkeypatch.setattr(jit_monitor, "_mode", "warn")
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", None)
    monkeypatch.setattr(knobs.autotuning, "print", False)
    return lambda: jit_monitor.activate(mode="error")


def serve(implementation, prepared, columns, tokens):
    x = torch.empty(tokens, columns, dtype=torch.bfloat16)
    rows, tensors = prepared.out_features, list(prepared.tensors.values())
    implementation.apply(x, tensors, None, rows, list(prepared.meta))


def dense_sparse_layer(rows, columns, scheme):
    from requant_kernels.dense_sparse.triton.implementation import Triton
    from requant_kernels.dense_sparse.triton.table import tables

    weight = random_weight(LayerScheme(scheme, SparseScheme()), (rows, columns))
    implementation = Triton(tables()["h200"])
    return implementation, implementation.prepare(weight, dense_sparse.LayerConfig.of(weight, torch.bfloat16, CPU))


@pytest.mark.parametrize(
    ("rows", "columns", "scheme"), [(384, 1024, WeightScheme(4, 128)), (144, 272, WeightScheme(3))], ids=str
)
def test_dense_plus_sparse(monitor, rows, columns, scheme):
    implementation, prepared = dense_sparse_layer(rows, columns, scheme)
    with emulated(90, runs=False):
        implementation.warm_up(prepared, torch.bfloat16, CPU, limit=LIMIT, biased=[False])
        monitor()
        for tokens in TOKENS:
            serve(implementation, prepared, columns, tokens)


def test_routed_experts(monitor):
    from requant_kernels.dense_sparse.triton.experts import RoutedExperts
    from requant_kernels.dense_sparse.triton.table import tables

    scheme, experts, top = LayerScheme(WeightScheme(4, 64), SparseScheme()), 6, 2
    gate_up, down = ([random_weight(scheme, shape)] * experts for shape in ((512, 1024), (1024, 256)))
    with emulated(90, runs=False):
        layer = RoutedExperts(gate_up, down, CPU, tables()["h200"])
        layer.warm_up(torch.bfloat16, CPU, top=top, limit=LIMIT)
        monitor()
        for tokens in TOKENS:
            ids = torch.zeros(tokens, top, dtype=torch.int32)
            layer(torch.empty(tokens, 1024, dtype=torch.bfloat16), torch.zeros(tokens, top), ids)


@pytest.mark.parametrize("shape", [(256, 1024), (80, 333)], ids=str)
def test_w8a8(monitor, shape):
    from requant_kernels.w8a8.triton.implementation import Triton
    from requant_kernels.w8a8.triton.table import tables

    weight = random_w8a8(ActivationScheme(dynamic=True), shape, dtype=torch.bfloat16)
    implementation = Triton(tables()["default"])
    prepared = implementation.prepare(weight, w8a8.LayerConfig.of(weight, torch.bfloat16, CPU))
    with emulated(90, runs=False):
        implementation.warm_up(prepared, torch.bfloat16, CPU, limit=LIMIT, biased=[False])
        monitor()
        for tokens in TOKENS:
            serve(implementation, prepared, shape[1], tokens)


def test_without_warm_up_the_monitor_speaks_up(monitor):
    implementation, prepared = dense_sparse_layer(32, 256, WeightScheme(2, 64))
    with emulated(90, runs=False):
        monitor()
        with pytest.raises(RuntimeError, match="Triton kernel JIT compilation during inference"):
            serve(implementation, prepared, 256, 1)
