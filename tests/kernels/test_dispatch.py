"""Every implementation that runs here agrees with the reference; the choice between them is explained; the operator is
one node for torch.compile."""

import logging
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from requant_kernels import choice, ops, reference
from requant_kernels.dense_sparse import dispatch
from requant_kernels.dense_sparse.interface import LayerConfig
from requant_kernels.scheme import LayerScheme, SparseScheme, WeightScheme

from tests.kernels.strategies import layers, random_weight

CPU = torch.device("cpu")
W4 = random_weight(LayerScheme(WeightScheme(4, 64, symmetric=False), SparseScheme()), (40, 128))
FP16 = random_weight(LayerScheme(WeightScheme(4, 64)), (40, 128), dtype=torch.float16)


def activations(tokens: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens)).to(dtype)


def assert_close(y: torch.Tensor, x: torch.Tensor, weight, bias: torch.Tensor | None) -> None:
    """Within the rounding of y's dtype of the sum of all absolute products: nothing that is added may be lost."""
    expected = reference.dense_sparse_linear(x.float(), weight, bias)
    magnitude = x.abs().float() @ reference.dequantize(weight).abs().T
    if bias is not None:
        magnitude = magnitude + bias.abs().float()
    tolerance = 2 * torch.finfo(y.dtype).eps
    assert ((y.float() - expected).abs() <= tolerance * (magnitude + 1)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@given(weight=layers(), tokens=st.sampled_from((1, 2, 63, 64, 65, 200)), with_bias=st.booleans())
def test_the_chosen_implementation_agrees_with_the_reference(dtype, weight, tokens, with_bias):
    weight = replace(weight, bias_correction=None)  # a bias like any other, which the caller adds
    x = activations(tokens, weight.in_features, dtype)
    bias = activations(1, weight.out_features, dtype)[0] if with_bias else None
    y = ops.dense_sparse_linear(x, dispatch.prepare(weight, dtype, CPU), bias)
    assert y.dtype == dtype
    assert y.is_contiguous()
    assert_close(y, x, weight, bias)


def test_leading_dimensions_and_strides_are_the_callers_affair():
    prepared = dispatch.prepare(W4, torch.bfloat16, CPU)
    x = activations(6, 256, torch.bfloat16)[:, ::2].view(2, 3, 128)
    y = ops.dense_sparse_linear(x, prepared)
    assert y.shape == (2, 3, 40)
    torch.testing.assert_close(y.view(6, 40), ops.dense_sparse_linear(x.reshape(6, 128), prepared))


def test_no_tokens_no_output():
    y = ops.dense_sparse_linear(torch.empty(0, 128), dispatch.prepare(W4, torch.float32, CPU))
    assert y.shape == (0, 40)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [1, 100])
def test_the_operator_keeps_its_promises_to_torch(dtype, tokens):
    prepared = dispatch.prepare(W4, dtype, CPU)
    arguments = (
        activations(tokens, 128, dtype),
        list(prepared.tensors.values()),
        activations(1, 40, dtype)[0],
        prepared.implementation,
        prepared.out_features,
        list(prepared.meta),
    )
    torch.library.opcheck(torch.ops.requant.dense_sparse_linear.default, arguments)


def test_the_operator_compiles_into_one_graph():
    prepared = dispatch.prepare(W4, torch.bfloat16, CPU)

    def model(x: torch.Tensor) -> torch.Tensor:
        return ops.dense_sparse_linear(torch.relu(x), prepared) * 2

    x = activations(3, 128, torch.bfloat16)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


def config(weight=W4, **changes) -> LayerConfig:
    return replace(LayerConfig.of(weight, torch.bfloat16, CPU), **changes)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (config(dtype=torch.float32), "activations of torch.float32: serve with --dtype bfloat16"),
        (config(FP16), "scales of torch.float16 are not exact"),
        (config(scheme=LayerScheme(WeightScheme(8, 64))), "8-bit codes"),
        (config(scheme=LayerScheme(WeightScheme(3, codebook=True))), "codebooks"),
        (config(group_size=24), "group 24"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_layer_that_cannot_stay_packed_on_a_cpu_is_decoded_and_the_log_says_why(layer, reason, caplog):
    choice._log_once.cache_clear()
    with caplog.at_level(logging.INFO, "requant_kernels"):
        assert dispatch.choose(layer).name == "dequantized"
    assert reason in caplog.text


@pytest.mark.parametrize(
    ("capability", "dtype", "chosen"),
    [
        ((9, 0), torch.bfloat16, "triton"),
        ((7, 5), torch.bfloat16, "dequantized"),
        ((9, 0), torch.float16, "dequantized"),  # stored in bfloat16
    ],
    ids=str,
)
def test_a_gpu_runs_the_kernels_where_they_can(capability, dtype, chosen, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert dispatch.choose(config(device=torch.device("cuda"), dtype=dtype)).name == chosen


def test_a_layer_that_nothing_can_run_is_refused_in_one_line():
    with pytest.raises(ValueError, match=r"^no implementation of 4-bit asymmetric group 64 .*not floating point"):
        dispatch.choose(config(dtype=torch.int8))


def test_the_choice_is_logged_once_per_kind(caplog):
    choice._log_once.cache_clear()
    with caplog.at_level(logging.INFO, "requant_kernels"):
        for weight in (W4, W4, FP16):
            dispatch.prepare(weight, torch.float16, CPU)
    lines = [record.message for record in caplog.records]
    assert len(lines) == 2
    assert "run as dequantized (" in lines[0]
    assert "cpu_int4: activations of torch.float16: serve with --dtype bfloat16" in lines[0]
