"""Quantized routed experts in vLLM: each is loaded, cut and laid out like any linear layer, and they run in turn."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from requant_kernels.dense_sparse import dispatch as dense_sparse
from requant_kernels.errors import SchemeError
from requant_kernels.experts import Expert, run_experts
from requant_kernels.layer import QuantizedLayer
from requant_kernels.ops import dense_sparse_linear, w8a8_linear
from requant_kernels.prepared import Prepared
from requant_kernels.scheme import LayerScheme
from requant_kernels.w8a8 import dispatch as w8a8
from vllm.config import CUDAGraphMode, get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, MoEActivation, RoutedExperts
from vllm.utils.torch_utils import direct_register_custom_op

from vllm_requant.dummy import dummy_layer
from vllm_requant.parameters import QUANTIZED, TENSORS, LayerLoader
from vllm_requant.sharding import LocalIndex

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


def refuse_graphs(device: torch.device, mode: CUDAGraphMode | None, prefix: str) -> None:
    """Raises SchemeError where vLLM would record the experts ``prefix`` in CUDA graphs of that ``mode``."""
    if device.type == "cuda" and mode not in (None, CUDAGraphMode.NONE):
        raise SchemeError(
            f"{prefix}: quantized experts can not be recorded in CUDA graphs, because which of them run depends on the "
            "tokens; serve with --enforce-eager, or compiled with -cc.cudagraph_mode=NONE"
        )


class Product:
    """One product of one expert on this rank: a function of x [M, K] as soon as it is loaded."""

    _prepared: Prepared

    def __init__(
        self, stored: Stored, index: LocalIndex, shape: tuple[int, int], dtype: torch.dtype, max_tokens: int
    ) -> None:
        """``shape`` [N, K]: on this rank."""
        self._scheme, self._shape, self._dtype = stored.scheme, shape, dtype
        self._device, self._max_tokens = torch.get_default_device(), max_tokens
        self.loader = LayerLoader(stored.names, stored.scheme, QUANTIZED, index, self._prepare)

    def fill(self) -> None:
        """For ``--load-format dummy``."""
        self._prepare(dummy_layer(self._scheme, *self._shape, self._dtype))

    def _prepare(self, weight: QuantizedLayer) -> None:
        dispatch: Any = w8a8 if self._scheme.activations else dense_sparse
        self._prepared = dispatch.prepare(weight, self._dtype, self._device)
        correction = weight.bias_correction
        biased = [correction is not None]
        dispatch.warm_up(self._prepared, self._dtype, self._device, limit=self._max_tokens, biased=biased)
        self._correction = None if correction is None else correction.to(self._device, self._dtype)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        linear = w8a8_linear if self._scheme.activations else dense_sparse_linear
        return linear(x, self._prepared, self._correction)


class RequantExpertsMethod(FusedMoEMethodBase):  # type: ignore[misc]
    """One instance per layer of experts. Experts may differ in their schemes."""

    def __init__(self, moe: Any, stored: list[dict[str, Stored]]) -> None:
        """``stored``: of each expert, by product."""
        super().__init__(moe)
        self._stored = stored
        self._products: list[dict[str, Product]] = []
        self.experts: list[Expert] = []

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
        refuse_graphs(torch.get_default_device(), config.compilation_config.cudagraph_mode, layer.layer_name)
        self._dummy = config.load_config.load_format == "dummy"
        shapes = {
            "w13": (2 * intermediate_size_per_partition, hidden_size),
            "w2": (hidden_size, intermediate_size_per_partition),
        }
        loader = extra_weight_attrs["weight_loader"]
        indices = {
            part: LocalIndex(self.moe, shape, part == "w2", _placing(loader, num_experts, SHARDS[part]))
            for part, shape in shapes.items()
        }
        max_tokens = config.scheduler_config.max_num_batched_tokens
        self._products = [
            {part: Product(one, indices[part], shapes[part], params_dtype, max_tokens) for part, one in expert.items()}
            for expert in self._stored
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
            self._products[expert_id][part].loader.load(tensor, loaded_weight, position)
            return True

        return load

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Raises CheckpointError where tensors are missing: vLLM itself would serve uninitialised memory."""
        for expert in self._products:
            for product in expert.values():
                product.fill() if self._dummy else product.loader.check_complete()
                product.loader.close()
        for name in _placeholders():
            delattr(layer, name)
        self.experts = [Expert(expert["w13"], expert["w2"]) for expert in self._products]

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
    return run_experts(x, topk_weights, topk_ids, runner.routed_experts.quant_method.experts)


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
