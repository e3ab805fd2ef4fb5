"""Quantized linear layers in vLLM: load, lay out, apply."""

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
from requant_kernels.dense_sparse import dispatch as dense_sparse
from requant_kernels.errors import SchemeError
from requant_kernels.layer import QuantizedLayer
from requant_kernels.ops import dense_sparse_linear, run_dense_sparse, run_w8a8
from requant_kernels.prepared import Prepared
from requant_kernels.scheme import LayerScheme
from requant_kernels.tensor_parallel import cut_groups
from requant_kernels.w8a8 import dispatch as w8a8
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    RowParallelLinear,
    register_weight_loader_v2_supported_method,
)

from vllm_requant.compile_cache import tell_compile_cache
from vllm_requant.dummy import dummy_layer
from vllm_requant.in_flight import unquantized
from vllm_requant.parameters import QUANTIZED, TENSORS, LayerLoader
from vllm_requant.sharding import LocalIndex

_LOG = init_logger(__name__)
UNIT_ROWS = 1024  # of the unit matrix, multiplied at a time


class RequantLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """What both kinds of layers share. One instance per layer; ``names`` are the stored layers it is made of, which
    ``in_flight`` are not quantized yet."""

    _dispatch: ModuleType  # prepare and warm_up of this kind
    _linear: Callable[..., torch.Tensor]  # and its operator

    def __init__(
        self,
        scheme: LayerScheme,
        names: list[str],
        *,
        in_flight: bool = False,
        when_built: Callable[[], None] = lambda: None,
    ) -> None:
        """``when_built``: to be called when vLLM has made all layers of the model."""
        self.scheme, self.names, self._in_flight, self._when_built = scheme, names, in_flight, when_built
        self._processed = False

    def create_weights(  # noqa: PLR0917 (vLLM's signature)
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Registers empty parameters that collect the file's tensors."""
        self._shape = (sum(output_partition_sizes), input_size_per_partition)
        self._dtype, self._device = params_dtype, torch.get_default_device()
        self._config = config = get_current_vllm_config()
        self._dummy = config.load_config.load_format == "dummy"
        self._max_tokens = config.scheduler_config.max_num_batched_tokens
        row_parallel = isinstance(layer, RowParallelLinear)
        index = LocalIndex(layer, self._shape, row_parallel, extra_weight_attrs["weight_loader"])
        form = unquantized(self._device) if self._in_flight else QUANTIZED
        self._loader = LayerLoader(self.names, self.scheme, form, index, self._prepare, dtype=params_dtype)
        if row_parallel:
            self._tell_cuts(input_size, input_size_per_partition)
        for name in TENSORS:
            layer.register_parameter(name, self._loader.placeholder(name))

    def _tell_cuts(self, columns: int, share: int) -> None:
        if what := cut_groups(columns, self.scheme.weights.group_size, columns // share):
            _LOG.warning_once("row-parallel layers: %s", what)

    def _prepare(self, weight: QuantizedLayer) -> None:
        self._prepared: Prepared = self._dispatch.prepare(weight, self._dtype, self._device)
        self._correction = weight.bias_correction

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Puts the runtime layout in the place of the empty parameters.

        Raises CheckpointError where tensors are missing: vLLM itself would serve uninitialised memory.
        """
        self._when_built()
        prepared = self._finish_loading()
        tell_compile_cache(self._config, self.names, prepared)
        own = getattr(layer, "bias", None) is not None  # which vLLM passes, or adds itself
        biased = {self.scheme.bias_correction, self.scheme.bias_correction or own}
        self._dispatch.warm_up(prepared, self._dtype, self._device, limit=self._max_tokens, biased=biased)
        runtime = dict(prepared.tensors)
        self._tensors, self._meta = tuple(runtime), list(prepared.meta)  # plain, because torch.compile reads them
        if self._correction is not None:
            runtime["bias_correction"] = self._correction.to(self._device, self._dtype)
        for name in TENSORS:
            delattr(layer, name)
        for name, tensor in runtime.items():
            layer.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
        self._implementation, self._out_features = prepared.implementation, prepared.out_features
        self._processed = True
        del self._prepared, self._correction  # vLLM may move what it finds in the layer, and frees its old place

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., K] -> [..., N], both as they lie on this rank."""
        if self.scheme.bias_correction:
            correction: torch.Tensor = layer.bias_correction  # type: ignore[assignment]
            bias = correction if bias is None else bias + correction
        tensors = [getattr(layer, name) for name in self._tensors]
        return self._linear(x, tensors, bias, self._implementation, self._out_features, self._meta)

    def _not_only_weights(self, what: str) -> SchemeError:
        return SchemeError(
            f'{self.names[0]}: has {what}, which vLLM\'s online quantization would drop; name the layer under "ignore" '
            "of --quantization-config, or leave that option out"
        )

    def _finish_loading(self) -> Prepared:
        if self._dummy:
            self._prepare(dummy_layer(self.scheme, *self._shape, self._dtype))
        else:
            self._loader.check_complete()
        self._loader.close()
        return self._prepared


@register_weight_loader_v2_supported_method
class DenseSparseLinearMethod(RequantLinearMethod):
    """Weights of few bits plus a sparse part."""

    _dispatch = dense_sparse
    _linear = staticmethod(run_dense_sparse)

    def dequantize_weight(self, layer: torch.nn.Module) -> torch.Tensor:
        """W [N, K] in the dtype of the activations, whatever the layout: (I W^T)^T.

        vLLM's online quantization asks for it instead of processing. Raises SchemeError for a layer that is more.
        """
        if self.scheme.bias_correction:
            raise self._not_only_weights("a bias correction")
        multiply = (
            partial(self.apply, layer)
            if self._processed
            else partial(dense_sparse_linear, prepared=self._finish_loading())
        )
        unit = torch.eye(self._shape[1], dtype=self._dtype, device=self._device)
        return torch.cat([multiply(rows) for rows in torch.split(unit, UNIT_ROWS)]).T.contiguous()


@register_weight_loader_v2_supported_method
class W8A8LinearMethod(RequantLinearMethod):
    """Weights and inputs of 8 bits."""

    _dispatch = w8a8
    _linear = staticmethod(run_w8a8)

    def dequantize_weight(self, layer: torch.nn.Module) -> torch.Tensor:
        """Raises SchemeError: what vLLM's online quantization would make of the weight alone is another layer."""
        raise self._not_only_weights("rounded inputs")
