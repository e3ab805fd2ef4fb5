"""Real layers of vLLM, rounded while they are loaded."""

import pytest
import torch
from requant_kernels.errors import CheckpointError
from requant_kernels.rounding.layer import round_layer
from requant_kernels.scheme import LayerScheme, WeightScheme
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

from tests.vllm_requant.layers import W8A8, K, assert_computes, build

pytestmark = pytest.mark.usefixtures("vllm_state")

ROUNDABLE = [LayerScheme(WeightScheme(4, 64, symmetric=False)), LayerScheme(WeightScheme(3)), W8A8[0]]


def load_unquantized(layer: LinearBase, weight: torch.Tensor, *shard) -> None:
    layer.weight.weight_loader(layer.weight, weight, *shard)


@pytest.mark.parametrize("scheme", ROUNDABLE, ids=LayerScheme.describe)
@pytest.mark.parametrize("kind", [ReplicatedLinear, ColumnParallelLinear, RowParallelLinear])
def test_a_layer_is_rounded_in_flight(kind, scheme):
    layer, weight = build(kind, K, 96, scheme=scheme, in_flight=True), torch.randn(96, K).bfloat16()
    load_unquantized(layer, weight)
    assert_computes(layer, round_layer(weight, scheme))


@pytest.mark.parametrize("scheme", ROUNDABLE, ids=LayerScheme.describe)
def test_fused_layers_are_rounded_one_by_one_in_flight(scheme):
    names = ("m.q", "m.k", "m.v")
    layer = build(QKVParallelLinear, K, 32, 4, 2, names=names, scheme=scheme, in_flight=True)
    weights = [torch.randn(rows, K) for rows in (128, 64, 64)]
    for shard, weight in zip("qkv", weights, strict=True):
        load_unquantized(layer, weight, shard)
    assert_computes(layer, *(round_layer(weight, scheme) for weight in weights))


def test_a_rank_takes_its_rows_of_what_is_rounded_whole():
    scheme, weight = ROUNDABLE[0], torch.randn(96, K)
    layer = build(ColumnParallelLinear, K, 96, tp_rank=1, tp_size=3, scheme=scheme, in_flight=True)
    load_unquantized(layer, weight)
    assert_computes(layer, round_layer(weight, scheme).take_rows(torch.arange(32, 64)))


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.full((96, K), float("nan")), "not finite"),
        (torch.zeros(96, K, dtype=torch.int8), r"dtype torch\.int8"),
        (torch.zeros(96), r"shape \[96\], not \[N, K\]"),
    ],
    ids=["NaN", "int8", "vector"],
)
def test_what_can_not_be_rounded_is_refused_by_name(weight, message):
    layer = build(ReplicatedLinear, K, 96, scheme=ROUNDABLE[0], in_flight=True)
    with pytest.raises(CheckpointError, match=rf"^m\.fc\.weight: {message}"):
        load_unquantized(layer, weight)


def test_a_weight_that_never_comes_is_named():
    layer = build(ReplicatedLinear, K, 96, scheme=ROUNDABLE[0], in_flight=True)
    with pytest.raises(CheckpointError, match=r"^m\.fc\.weight: missing in the checkpoint"):
        layer.quant_method.process_weights_after_loading(layer)
