"""Quantized routed experts in vLLM: each is loaded and cut like any linear layer. Where all of a layer have one scheme,
and the GPU's kernels take it, they are laid out as one layer of experts; elsewhere one by one, and run in turn."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from requant_kernels.dense_sparse import dispatch as dense_sparse
from requant_kernels.dense_sparse.triton import experts as triton_experts
from requant_kernels.errors import SchemeError
from requant_kernels.experts import Expert, run_experts
from requant_kernels.layer import QuantizedLayer
from requant_kernels.ops import dense_sparse_linear, w8a8_linear
from requant_kernels.scheme import LayerScheme
from requant_kernels.w8a8 import dispatch as w8a8
from vllm.config import CUDAGraphMode, get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, MoEActivation, RoutedExperts
from vllm.utils.torch_utils import direct_register_custom_op

from vllm_requant.dummy import dummy_layer
from vllm_requant.parameters import QUANTIZED, TENSORS, LayerLoader
from vllm_requant.sharding import LocalIndex

_LOG = logging.getLogger(__name__)
# The two products of an expert, by vLLM's name of each, and those of the stored layers that it is made of.
SHARDS = {"w13": ("w1", "w3"), "w2": ("w2",)}
PLACES = {shard: (part, position) for part, shards in SHARDS.items() for position, shard in enumerate(shards)}


@dataclass(frozen=True)
class Stored:
    """What one product of an expert is made of in the checkpoint: gate and up, or down."""

    names: list[str]
    scheme: LayerScheme


def experts_method(
    layer: RoutedExperts, prefix: str, scheme_of: Callable[[str, list[str]], LayerScheme | None]
) -> "RequantExpertsMethod | None":
    """None where the checkpoint ignores all of the experts; then vLLM runs them itself. ``scheme_of``: of layers that
    run as one. Raises SchemeError where it ignores some, and for what can not be served."""
    parts = {
        "w13": (layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name),
        "w2": (layer.ckpt_down_proj_name,),
    }
    experts: list[dict[str, Stored]] = []
    ignored: list[str] = []
    for expert in (f"{prefix}.{index}" for index in range(layer.global_num_experts)):
        experts.append({})
        for part, last in parts.items():
            names = [f"{expert}.{name}" for name in last]
            if scheme := scheme_of(expert, names):
                experts[-1][part] = Stored(names, scheme)
            else:
                ignored += names
    if not any(experts):
        return None
    if ignored:
        raise SchemeError(f"{ignored[0]}: of the experts of one layer, either all must be ignored or none")
    _refuse_unsupported(layer, prefix)
    return RequantExpertsMethod(layer.moe_config, experts)


def _refuse_unsupported(layer: RoutedExperts, prefix: str) -> None:
    moe = layer.moe_config
    refusals = {
        "expert parallelism (leave it out: tensor parallelism cuts every expert)": moe.moe_parallel_config.use_ep,
        "EPLB": moe.moe_parallel_config.enable_eplb,
        "shared experts fused into the routed ones": layer.expert_map_manager.num_fused_shared_experts > 0,
        "LoRA": moe.is_lora_enabled,
        "biases": moe.has_bias,
        "router weights applied to the input": layer.apply_router_weight_on_input,
        f"activation {moe.activation.value!r}": moe.activation != MoEActivation.SILU,
    }
    for what, wanted in refusals.items():
        if wanted:
            raise SchemeError(f"{prefix}: quantized experts can not be served with {what}")


def refuse_graphs(device: torch.device, mode: CUDAGraphMode | None, prefix: str, reason: str) -> None:
    """Raises SchemeError where vLLM would record the experts ``prefix`` in CUDA graphs of that ``mode``, although they
    have to run in turn for that ``reason``."""
    if device.type == "cuda" and mode not in (None, CUDAGraphMode.NONE):
        raise SchemeError(
            f"{prefix}: quantized experts that run in turn ({reason}) can not be recorded in CUDA graphs, because it "
            "depends on the tokens which do; serve with --enforce-eager, or compiled with -cc.cudagraph_mode=NONE"
        )


def why_in_turn(stored: Sequence[dict[str, Stored]], dtype: torch.dtype, device: torch.device) -> str:
    """What in their schemes keeps the experts of a layer from being one; nothing where they can be."""
    for part in SHARDS:
        first, *others = (expert[part] for expert in stored)
        for other in others:
            if other.scheme != first.scheme:
                return f"{other.names[0]} and {first.names[0]} differ in scheme"
        able, reason = triton_experts.can_implement(first.scheme, dtype, device)
        if not able:
            return reason
    return ""


class Product:
    """One product of one expert, laid out: a function of x [M, K]."""

    def __init__(self, weight: QuantizedLayer, dtype: torch.dtype, device: torch.device, max_tokens: int) -> None:
        activations = bool(weight.scheme.activations)
        dispatch: Any = w8a8 if activations else dense_sparse
        self._linear = w8a8_linear if activations else dense_sparse_linear
        self._prepared = dispatch.prepare(weight, dtype, device)
        correction = weight.bias_correction
        dispatch.warm_up(self._prepared, dtype, device, limit=max_tokens, biased=[correction is not None])
        self._correction = None if correction is None else correction.to(device, dtype)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._linear(x, self._prepared, self._correction)


# x [M, C], the weights [M, k] of each token's experts, and their numbers -> [M, C]
Experts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class RequantExpertsMethod(FusedMoEMethodBase):  # type: ignore[misc]
    """One instance per layer of experts. Experts may differ in their schemes."""

    def __init__(self, moe: Any, stored: list[dict[str, Stored]]) -> None:
        """``stored``: of each expert, by product."""
        super().__init__(moe)
        self._stored = stored
        self._loaders: list[dict[str, LayerLoader]] = []
        self._weights: list[dict[str, Any]] = [{} for _ in stored]  # until they are laid out
        self.run: Experts

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Registers empty parameters that hand the file's tensors to the products they belong to."""
        config = get_current_vllm_config()
        self._dtype, self._device = params_dtype, torch.get_default_device()
        self._name, self._graphs = layer.layer_name, config.compilation_config.cudagraph_mode
        self._settle(why_in_turn(self._stored, self._dtype, self._device))
        self._dummy = config.load_config.load_format == "dummy"
        self._max_tokens = config.scheduler_config.max_num_batched_tokens
        self._shapes = shapes = {
            "w13": (2 * intermediate_size_per_partition, hidden_size),
            "w2": (hidden_size, intermediate_size_per_partition),
        }
        loader = extra_weight_attrs["weight_loader"]
        indices = {
            part: LocalIndex(self.moe, shape, part == "w2", _placing(loader, num_experts, SHARDS[part]))
            for part, shape in shapes.items()
        }
        self._loaders = [
            {
                part: LayerLoader(
                    one.names,
                    one.scheme,
                    QUANTIZED,
                    indices[part],
                    partial(self._take, number, part),
                    dtype=params_dtype,
                )
                for part, one in expert.items()
            }
            for number, expert in enumerate(self._stored)
        ]
        for name, tensor in _placeholders().items():
            empty = torch.nn.Parameter(torch.empty(0, dtype=TENSORS[tensor] or params_dtype), requires_grad=False)
            empty.weight_loader = self._loading(tensor)  # type: ignore[attr-defined]
            layer.register_parameter(name, empty)

    def _loading(self, tensor: str) -> Callable[..., bool]:
        def load(  # noqa: PLR0917 (vLLM's signature)
            param: torch.nn.Parameter,
            loaded_weight: torch.Tensor,
            weight_name: str,
            shard_id: str,
            expert_id: int,
            return_success: bool = False,
        ) -> bool:
            part, position = PLACES[shard_id]
            self._loaders[expert_id][part].load(tensor, loaded_weight, position)
            return True

        return load

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Raises CheckpointError where tensors are missing: vLLM itself would serve uninitialised memory."""
        for number, expert in enumerate(self._loaders):
            for part, loader in expert.items():
                if self._dummy:
                    scheme = self._stored[number][part].scheme
                    self._take(number, part, dummy_layer(scheme, *self._shapes[part], self._dtype))
                else:
                    loader.check_complete()
                loader.close()
        for name in _placeholders():
            delattr(layer, name)

    def _settle(self, reason: str) -> None:
        """Whether the experts run in turn, for that ``reason``. Raises SchemeError where they must not."""
        self._in_turn = reason
        if reason:
            refuse_graphs(self._device, self._graphs, self._name, reason)

    def _take(self, number: int, part: str, weight: QuantizedLayer) -> None:
        """A product of expert ``number`` is loaded; with the last of them all are laid out."""
        self._weights[number][part] = weight
        if any(len(weights) < len(SHARDS) for weights in self._weights):
            return
        gate_up, down = ([weights[part] for weights in self._weights] for part in SHARDS)
        self._weights.clear()
        if not self._in_turn:
            self._settle(triton_experts.unfit((gate_up[0], down[0]), self._dtype, self._device))
        if self._in_turn:
            _LOG.info("%s: experts run in turn (%s)", self._name, self._in_turn)
            products = (
                [Product(weight, self._dtype, self._device, self._max_tokens) for weight in weights]
                for weights in (gate_up, down)
            )
            experts = [Expert(*both) for both in zip(*products, strict=True)]
            self.run = partial(run_experts, experts=experts)
            return
        _LOG.info("%s: experts run as one layer", self._name)
        together = triton_experts.RoutedExperts(gate_up, down, self._device)
        together.warm_up(self._dtype, self._device, top=self.moe.experts_per_token, limit=self._max_tokens)
        self.run = together

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> None:
        """For vLLM's own kernels, none of which runs here."""

    def apply(  # noqa: PLR0917 (vLLM's signature)
        self,
        layer: RoutedExperts,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        """x [M, C] -> this rank's share of the sum over experts [M, C]; vLLM adds the ranks' and the shared experts."""
        return torch.ops.requant.routed_experts(x, topk_weights, topk_ids, layer.layer_name)


def _placeholders() -> dict[str, str]:
    """vLLM's name of a parameter -> the tensor that it stands for, for every one that a file may hold for an expert."""
    return {f"{part}_{tensor}": tensor for part in SHARDS for tensor in TENSORS}


def _placing(weight_loader: Callable[..., Any], num_experts: int, shards: Sequence[str]) -> Callable[..., None]:
    """vLLM's loader of expert weights with the signature of a linear layer's, for LocalIndex to ask."""

    def load(index: torch.nn.Parameter, numbers: torch.Tensor, position: int) -> None:
        # all experts are cut alike, so one index stands for each
        experts = torch.nn.Parameter(index.data.expand(num_experts, -1, -1), requires_grad=False)
        weight_loader(experts, numbers, "weight", shards[position], 0)

    return load


def _routed_experts(
    x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, layer_name: str
) -> torch.Tensor:
    runner: Any = get_forward_context().no_compile_layers[layer_name]
    return runner.routed_experts.quant_method.run(x, topk_weights, topk_ids)


def _fake(x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, layer_name: str) -> torch.Tensor:
    return torch.empty_like(x)


# One node for torch.compile, which on a CPU looks into the rest of the layer: what runs depends on the tokens.
_LIBRARY = torch.library.Library("requant", "FRAGMENT")  # type: ignore[no-untyped-call]
direct_register_custom_op(
    "routed_experts",
    _routed_experts,
    fake_impl=_fake,
    target_lib=_LIBRARY,
    dispatch_key="CompositeExplicitAutograd",
)
