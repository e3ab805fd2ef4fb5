"""Real layers of vLLM, loaded tensor by tensor as vLLM's model loader does, without a model around them."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from requant_kernels import reference
from requant_kernels.dense_sparse import dispatch, int4_panels
from requant_kernels.dense_sparse.triton.strips import build_strips
from requant_kernels.errors import CheckpointError, SchemeError
from requant_kernels.scheme import LayerScheme, SparseScheme, WeightScheme
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

from tests.kernels.strategies import random_weight
from tests.vllm_requant.layers import SCHEME, W8A8, K, assert_computes, build, load, stored

pytestmark = pytest.mark.usefixtures("vllm_state")


@pytest.mark.parametrize("kind", [ReplicatedLinear, ColumnParallelLinear, RowParallelLinear])
def test_a_plain_layer(kind):
    layer, weight = build(kind, K, 96), stored(96)
    load(layer, weight)
    assert_computes(layer, weight)


@pytest.mark.parametrize(
    ("bias", "correction", "expected"),
    [(False, False, {False}), (True, False, {False, True}), (False, True, {True}), (True, True, {True})],
)
def test_only_what_serving_reaches_is_warmed_up(bias, correction, expected, monkeypatch):
    scheme = replace(SCHEME, bias_correction=correction)
    layer = build(ReplicatedLinear, K, 96, scheme=scheme, bias=bias)
    load(layer, stored(96, scheme=scheme))
    seen = []
    monkeypatch.setattr(dispatch, "warm_up", lambda *_, biased, **__: seen.append(biased))
    layer.quant_method.process_weights_after_loading(layer)
    assert seen == [expected]


@pytest.mark.parametrize("scheme", W8A8, ids=lambda scheme: str(scheme.activations))
@pytest.mark.parametrize("kind", [ReplicatedLinear, ColumnParallelLinear, RowParallelLinear])
def test_a_plain_w8a8_layer(kind, scheme):
    layer, weight = build(kind, K, 95, scheme=scheme), stored(95, scheme=scheme)
    load(layer, weight)
    assert_computes(layer, weight)
    assert hasattr(layer, "weight")


def test_w8a8_query_key_value():
    layer = build(QKVParallelLinear, K, 32, 4, 2, names=("m.q", "m.k", "m.v"), scheme=W8A8[3])
    parts = stored(128, scheme=W8A8[3]), stored(64, 1, scheme=W8A8[3]), stored(64, 2, scheme=W8A8[3])
    parts = [replace(part, input_zero_point=parts[0].input_zero_point) for part in parts]
    for shard, part in zip("vqk", (parts[2], parts[0], parts[1]), strict=True):
        load(layer, part, shard)
    assert_computes(layer, *parts)


def test_fused_w8a8_layers_with_different_input_steps_are_refused():
    layer = build(MergedColumnParallelLinear, K, [64, 64], names=("m.gate", "m.up"), scheme=W8A8[2])
    load(layer, stored(64, scheme=W8A8[2]), 0)
    with pytest.raises(
        CheckpointError, match=r"^m\.gate, m\.up: layers that are fused into one must share input_scale"
    ):
        load(layer, stored(64, scheme=W8A8[2]), 1, changed={"input_scale": torch.ones(1).bfloat16()})


def test_what_the_kernels_of_a_gpu_refuse_is_named(monkeypatch):
    """Their layout is made here as it is there."""
    monkeypatch.setattr(dispatch, "prepare", lambda weight, dtype, device: build_strips(weight))
    layer = build(ReplicatedLinear, K, 32, dtype=torch.float16)
    weight = random_weight(SCHEME, (32, K), dtype=torch.float16)
    with pytest.raises(CheckpointError, match=r"^m\.fc: weight_scale: 200 is too large for the kernels in .*: use bfl"):
        load(layer, weight, changed={"weight_scale": torch.full_like(weight.scale, 200)})


@pytest.mark.parametrize("scheme", W8A8, ids=lambda scheme: str(scheme.activations))
def test_a_rank_takes_its_rows_of_a_w8a8_layer(scheme):
    layer, weight = build(ColumnParallelLinear, K, 96, tp_rank=1, tp_size=3, scheme=scheme), stored(96, scheme=scheme)
    load(layer, weight)
    assert_computes(layer, weight.take_rows(torch.arange(32, 64)))


def test_merged_layers_in_any_order():
    layer, parts = build(MergedColumnParallelLinear, K, [96, 64], names=("m.gate", "m.up")), (stored(96), stored(64, 1))
    load(layer, parts[1], 1)
    load(layer, parts[0], 0)
    assert_computes(layer, *parts)


def test_query_key_value():
    layer = build(QKVParallelLinear, K, 32, 4, 2, names=("m.q", "m.k", "m.v"))
    parts = stored(128), stored(64, 1), stored(64, 2)
    for shard, part in zip("vqk", (parts[2], parts[0], parts[1]), strict=True):
        load(layer, part, shard)
    assert_computes(layer, *parts)


@pytest.mark.parametrize(
    ("kind", "sizes"), [(MergedColumnParallelLinear, (K, [96, 64])), (QKVParallelLinear, (K, 32, 3, 1))], ids=str
)
def test_layers_that_are_fused_in_the_file_already(kind, sizes):
    layer, weight = build(kind, *sizes), stored(160)
    load(layer, weight)
    assert_computes(layer, weight)


@pytest.mark.parametrize(("rank", "ranks"), [(0, 3), (1, 3), (2, 3)])
def test_a_rank_takes_its_rows(rank, ranks):
    layer, weight = build(ColumnParallelLinear, K, 96, tp_rank=rank, tp_size=ranks), stored(96)
    load(layer, weight)
    assert_computes(layer, weight.take_rows(torch.arange(32 * rank, 32 * (rank + 1))))


def test_a_bias_correction_is_a_bias_beside_the_models():
    scheme = LayerScheme(WeightScheme(4, 64), None, bias_correction=True)
    layer, weight = build(ReplicatedLinear, K, 96, scheme=scheme, bias=True), stored(96, scheme=scheme)
    layer.bias.data.fill_(0.5)
    load(layer, weight)
    layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(2, K)
    expected = reference.dense_sparse_linear(x, weight, layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_weight_can_be_had_back(dtype):
    layer, weight = build(ReplicatedLinear, K, 96, dtype=dtype), stored(96)
    load(layer, weight)
    method, expected, tolerance = layer.quant_method, reference.dequantize(weight), 2 * torch.finfo(dtype).eps
    instead_of_processing = method.dequantize_weight(layer)
    method.process_weights_after_loading(layer)
    for decoded in (instead_of_processing, method.dequantize_weight(layer)):
        torch.testing.assert_close(decoded.float(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("served", [torch.bfloat16, torch.float16], ids=str)
def test_steps_of_another_dtype_are_rounded_to_the_one_that_is_served(served):
    """As vLLM rounds the weights of any model; no packed layer would take them as they are."""
    layer, weight = build(ReplicatedLinear, K, 96, dtype=served), random_weight(SCHEME, (96, K), dtype=torch.float32)
    load(layer, weight)
    layer.quant_method.process_weights_after_loading(layer)
    rounded = {
        name: tensor.to(served) if tensor.is_floating_point() else tensor
        for name, tensor in weight.to_tensors().items()
    }
    same = build(ReplicatedLinear, K, 96, dtype=served)
    load(same, weight, changed=rounded)
    same.quant_method.process_weights_after_loading(same)
    assert layer.quant_method._implementation == same.quant_method._implementation
    x = torch.randn(5, K).to(served)
    assert torch.equal(layer(x), same(x))
    if served == torch.bfloat16 and not int4_panels.unavailable():
        assert layer.quant_method._implementation != "dequantized"


def test_shards_need_no_names_of_their_own():
    """Some models of vLLM fuse layers without saying which (gptj.py); some number them with gaps (qwen3_5.py)."""
    heads = build(QKVParallelLinear, K, 32, 4, 2, names=["m.qkv_proj"])
    query, key, value = stored(128, 1), stored(64, 2), stored(64, 3)
    for shard, weight in (("k", key), ("v", value), ("q", query)):
        load(heads, weight, shard)
    assert_computes(heads, query, key, value)
    merged = build(MergedColumnParallelLinear, K, [64, 32, 32, 96], names=["m.in_proj_qkv", "m.in_proj_z"])
    first, last = stored(128, 4), stored(96, 5)
    load(merged, first, (0, 1, 2))
    load(merged, last, 3)
    assert_computes(merged, first, last)


def test_rows_lie_where_a_loader_of_the_models_own_puts_them():
    """mamba_mixer2.py replaces the loader of ``weight`` alone."""
    layer, weight = build(ColumnParallelLinear, K, 96), stored(96)

    def backwards(parameter: torch.Tensor, loaded: torch.Tensor) -> None:
        parameter.data[...] = loaded.flip(0)

    layer.weight.weight_loader = backwards
    load(layer, weight)
    assert_computes(layer, weight.take_rows(torch.arange(96).flip(0)))


def test_nothing_keeps_a_layout_but_the_layer():
    """vLLM's offloading moves parameters, which frees nothing that others hold."""
    layer = build(ReplicatedLinear, K, 96)
    load(layer, stored(96))
    layer.quant_method.process_weights_after_loading(layer)
    kept = [weakref.ref(parameter.untyped_storage()) for parameter in layer.parameters()]
    for parameter in layer.parameters():
        parameter.data = parameter.data.clone()
    gc.collect()
    assert not any(storage() for storage in kept)


@pytest.mark.parametrize(
    ("scheme", "more"),
    [(LayerScheme(WeightScheme(4, 64), None, bias_correction=True), "a bias correction"), (W8A8[0], "rounded inputs")],
    ids=["corrected", "W8A8"],
)
def test_a_layer_that_is_more_than_its_weight_does_not_give_it(scheme, more):
    layer = build(ReplicatedLinear, K, 96, scheme=scheme)
    load(layer, stored(96, scheme=scheme))
    with pytest.raises(SchemeError, match=f"^m.fc: has {more}, which vLLM's online quantization would drop"):
        layer.quant_method.dequantize_weight(layer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_what_other_parts_of_vllm_look_for_stays_on_the_layer(dtype):
    layer = build(ReplicatedLinear, K, 96, dtype=dtype)
    load(layer, stored(96))
    layer.quant_method.process_weights_after_loading(layer)
    assert any(hasattr(layer, name) for name in ("weight", "weight_packed", "qweight"))
    assert all(parameter.numel() for parameter in layer.parameters())


def test_dummy_weights_need_no_checkpoint(monkeypatch):
    monkeypatch.setattr(get_current_vllm_config().load_config, "load_format", "dummy")
    schemes = [
        LayerScheme(weights, SparseScheme(), bias_correction=bias_correction)
        for weights in (WeightScheme(4, 64, symmetric=False), WeightScheme(3, codebook=True))
        for bias_correction in (False, True)
    ]
    for scheme in (*schemes, *W8A8):
        layer = build(RowParallelLinear, K, 96, scheme=scheme)
        layer.quant_method.process_weights_after_loading(layer)
        y = layer(torch.ones(2, K))
        assert y.shape == (2, 96)
        assert torch.isfinite(y).all()


@pytest.mark.parametrize("missing", list(stored(96).to_tensors()))
def test_a_missing_tensor_is_named(missing):
    layer = build(ReplicatedLinear, K, 96)
    load(layer, stored(96), without=(missing,))
    with pytest.raises(CheckpointError, match=rf"^m\.fc\.{missing}: missing in the checkpoint$"):
        layer.quant_method.process_weights_after_loading(layer)


def test_a_missing_part_of_a_fused_layer_is_named():
    layer = build(QKVParallelLinear, K, 32, 4, 2, names=("m.q", "m.k", "m.v"))
    load(layer, stored(128), "q")
    load(layer, stored(64), "v")
    with pytest.raises(CheckpointError, match=r"^m\.k\.weight_packed: missing"):
        layer.quant_method.process_weights_after_loading(layer)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weight": torch.zeros(96, K)}, r"m\.fc\.weight: stored unquantized"),
        ({"weight_codebook": torch.zeros(96, 16)}, r"m\.fc\.weight_codebook: not expected"),
        ({"sparse_row_offsets": torch.zeros(97, dtype=torch.int32)}, r"m\.fc\.sparse_row_offsets: not monotone"),
        ({"weight_scale": torch.full((96, 3), float("nan"))}, r"m\.fc\.weight_scale: not finite"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_wrong_tensor_is_refused_by_name(changed, message):
    layer = build(ReplicatedLinear, K, 96)
    with pytest.raises(CheckpointError, match=f"^{message}"):
        load(layer, stored(96), changed=changed)


def test_a_tensor_that_comes_twice_is_refused():
    layer = build(MergedColumnParallelLinear, K, [96, 96], names=("m.gate", "m.up"))
    load(layer, stored(96), 0)
    with pytest.raises(CheckpointError, match=r"^m\.gate\.weight_packed: loaded twice"):
        load(layer, stored(96), 0)


@pytest.mark.parametrize(
    ("kind", "weight"),
    [
        (ReplicatedLinear, stored(95)),
        (ReplicatedLinear, stored(96, columns=128)),
        (ColumnParallelLinear, stored(97)),
        (ColumnParallelLinear, stored(96, columns=256)),
        (RowParallelLinear, stored(95)),
        (RowParallelLinear, stored(96, columns=128)),
        (RowParallelLinear, stored(96, columns=256)),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else f"{value.out_features}x{value.in_features}",
)
def test_a_layer_of_another_shape_is_refused_by_name(kind, weight):
    with pytest.raises(CheckpointError, match=r"^m\.fc: has \d+ (rows|columns), "):
        load(build(kind, K, 96), weight)


@pytest.mark.parametrize(("rank", "rows"), [(2, 99), (2, 192), (0, 30)])
def test_a_rank_notices_that_its_share_is_not_the_models(rank, rows):
    with pytest.raises(CheckpointError, match=rf"^m\.fc: has {rows} rows, which do not fit"):
        load(build(ColumnParallelLinear, K, 96, tp_rank=rank, tp_size=3), stored(rows))
