"""Which experts are ours to serve, and what vLLM offers for experts that is refused by name."""

import re
from types import SimpleNamespace

import pytest
import torch
from requant_kernels import gpu
from requant_kernels.errors import SchemeError
from requant_kernels.scheme import W8A8_WEIGHTS, ActivationScheme, CheckpointScheme, LayerScheme, WeightScheme
from vllm.config import CUDAGraphMode
from vllm.model_executor.layers.fused_moe import MoEActivation, RoutedExperts

from vllm_requant.config import RequantConfig
from vllm_requant.moe import RequantExpertsMethod, refuse_graphs, why_in_turn

W4, W3 = LayerScheme(WeightScheme(4, 64)), LayerScheme(WeightScheme(3, 64))
W8A8 = LayerScheme(W8A8_WEIGHTS, None, ActivationScheme(dynamic=True))
PREFIX = "model.layers.0.mlp.experts"


def layer(*, parallel: dict | None = None, moe: dict | None = None, shared: int = 0, **more) -> RoutedExperts:
    """Two experts: all that a config may look at, with what differs from the usual."""
    result = RoutedExperts.__new__(RoutedExperts)
    ranks = SimpleNamespace(**{"use_ep": False, "enable_eplb": False} | (parallel or {}))
    usual = {"is_lora_enabled": False, "has_bias": False, "activation": MoEActivation.SILU}
    result.__dict__ |= {
        "global_num_experts": 2,
        "ckpt_gate_proj_name": "gate_proj",
        "ckpt_up_proj_name": "up_proj",
        "ckpt_down_proj_name": "down_proj",
        "apply_router_weight_on_input": False,
        "moe_config": SimpleNamespace(moe_parallel_config=ranks, **usual | (moe or {})),
        "expert_map_manager": SimpleNamespace(num_fused_shared_experts=shared),
    } | more
    return result


def method(experts: RoutedExperts, **arguments):
    config = RequantConfig.from_config(CheckpointScheme(W4, **arguments).to_dict())
    return config.get_quant_method(experts, PREFIX)


def test_every_expert_has_the_scheme_of_its_layers():
    found = method(layer(), overrides={r".*experts\.1\.(gate|up)_proj": W3})
    assert isinstance(found, RequantExpertsMethod)
    schemes = [[expert[part].scheme for part in ("w13", "w2")] for expert in found._stored]
    assert schemes == [[W4, W4], [W3, W4]]
    assert found._stored[1]["w13"].names == [f"{PREFIX}.1.gate_proj", f"{PREFIX}.1.up_proj"]


def test_experts_that_are_all_ignored_are_left_to_vllm():
    assert method(layer(parallel={"use_ep": True}), ignore=(r".*experts\..*",)) is None


def test_in_flight_experts_must_be_ignored():
    config = RequantConfig.from_config(CheckpointScheme(W4).to_dict())
    config.in_flight = True
    with pytest.raises(SchemeError, match=rf"^{PREFIX}: experts can not be rounded in flight; make a checkpoint"):
        config.get_quant_method(layer(), PREFIX)
    config.scheme = CheckpointScheme(W4, ignore=(r".*experts.*",))
    assert config.get_quant_method(layer(), PREFIX) is None


@pytest.mark.parametrize(
    ("ignored", "message"),
    [
        (r".*experts\.1\..*", f"{PREFIX}.1.gate_proj: of the experts of one layer, either all must be ignored or none"),
        (r".*\.gate_proj", f"{PREFIX}.0: vLLM fuses {PREFIX}.0.gate_proj and {PREFIX}.0.up_proj"),
    ],
    ids=["an expert", "a gate"],
)
def test_experts_that_are_partly_ignored_are_refused_by_name(ignored, message):
    with pytest.raises(SchemeError, match=f"^{re.escape(message)}"):
        method(layer(), ignore=(ignored,))


@pytest.mark.parametrize(
    ("unusual", "named"),
    [
        ({"parallel": {"use_ep": True}}, "expert parallelism"),
        ({"parallel": {"enable_eplb": True}}, "EPLB"),
        ({"shared": 1}, "shared experts fused into the routed ones"),
        ({"moe": {"is_lora_enabled": True}}, "LoRA"),
        ({"moe": {"has_bias": True}}, "biases"),
        ({"moe": {"activation": MoEActivation.GELU}}, "activation 'gelu'"),
        ({"apply_router_weight_on_input": True}, "router weights applied to the input"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_served_with_is_refused_by_name(unusual, named):
    with pytest.raises(SchemeError, match=f"^{PREFIX}: quantized experts can not be served with {re.escape(named)}"):
        method(layer(**unusual))


@pytest.mark.parametrize("mode", [mode for mode in CUDAGraphMode if mode != CUDAGraphMode.NONE])
def test_cuda_graphs_are_refused_with_the_way_out(mode):
    with pytest.raises(
        SchemeError, match=rf"^{PREFIX}: .*\(why\) .* CUDA graphs, .* --enforce-eager, .* -cc\.cudagraph_mode=NONE"
    ):
        refuse_graphs(torch.device("cuda"), mode, PREFIX, "why")


@pytest.mark.parametrize(
    ("device", "mode"), [("cuda", CUDAGraphMode.NONE), ("cuda", None), ("cpu", CUDAGraphMode.FULL_AND_PIECEWISE)]
)
def test_experts_run_where_no_graph_is_recorded(device, mode):
    refuse_graphs(torch.device(device), mode, PREFIX, "why")


@pytest.mark.parametrize(
    ("overrides", "dtype", "reason"),
    [
        ({}, torch.bfloat16, ""),
        ({r".*\.down_proj": W3}, torch.bfloat16, ""),  # all experts alike
        ({r".*experts\.1\.(gate|up)_proj": W3}, torch.bfloat16, "1.gate_proj and .*0.gate_proj differ in scheme"),
        ({r".*": W8A8}, torch.bfloat16, "int8 inputs"),
        ({}, torch.float32, "activations of torch.float32: serve with --dtype bfloat16 or float16"),
    ],
    ids=["alike", "by product", "one differs", "int8", "float32"],
)
def test_experts_are_one_layer_where_their_schemes_allow_it(overrides, dtype, reason, monkeypatch):
    monkeypatch.setattr(gpu, "able", lambda device: (True, ""))
    stored = method(layer(), overrides=overrides)._stored
    assert re.search(f"{reason}$", why_in_turn(stored, dtype, torch.device("cuda")))


def test_experts_run_in_turn_on_a_cpu():
    stored = method(layer())._stored
    assert why_in_turn(stored, torch.bfloat16, torch.device("cpu")) == "runs on CUDA devices, not on cpu"
