"""Dense-plus-sparse linear layers in vLLM: load, lay out, apply."""

from typing import Any

import requant_kernels.ops  # noqa: F401 (registers the operator)
import torch
from requant_kernels.dense_sparse import dispatch
from requant_kernels.scheme import LayerScheme
from requant_kernels.weight import DenseSparseWeight
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    RowParallelLinear,
    register_weight_loader_v2_supported_method,
)

from vllm_requant.dummy import dummy_weight
from vllm_requant.parameters import TENSORS, LayerLoader
from vllm_requant.sharding import LocalIndex

UNIT_ROWS = 1024  # of the unit matrix, multiplied at a time


@register_weight_loader_v2_supported_method
class DenseSparseLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """One instance per layer; ``names`` are the stored layers it is made of."""

    def __init__(self, scheme: LayerScheme, names: list[str]) -> None:
        self.scheme, self.names = scheme, names

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
        self._dummy = get_current_vllm_config().load_config.load_format == "dummy"
        row_parallel = isinstance(layer, RowParallelLinear)
        index = LocalIndex(layer, self._shape, row_parallel, extra_weight_attrs["weight_loader"])
        self._loader = LayerLoader(self.names, self.scheme, index, lambda weight: self._finish(layer, weight))
        for name in TENSORS:
            layer.register_parameter(name, self._loader.placeholder(name, params_dtype))

    def _finish(self, layer: torch.nn.Module, weight: DenseSparseWeight) -> None:
        """The runtime layout takes the place of the empty parameters."""
        prepared = dispatch.prepare(weight, self._dtype, self._device)
        for name in TENSORS:
            delattr(layer, name)
        for name, tensor in prepared.tensors.items():
            layer.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
        # Plain attributes, because torch.compile reads them for each layer.
        self._tensors, self._meta = tuple(prepared.tensors), list(prepared.meta)
        self._implementation, self._out_features = prepared.implementation, prepared.out_features

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Raises CheckpointError where tensors are missing: vLLM itself would serve uninitialised memory."""
        if self._dummy:
            self._finish(layer, dummy_weight(self.scheme, *self._shape, self._dtype))
        else:
            self._loader.check_complete()

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., K] -> [..., N], both as they lie on this rank."""
        return torch.ops.requant.dense_sparse_linear.default(
            x,
            [getattr(layer, name) for name in self._tensors],
            bias,
            self._implementation,
            self._out_features,
            self._meta,
        )

    def dequantize_weight(self, layer: torch.nn.Module) -> torch.Tensor:
        """W [N, K] in the dtype of the activations, for vLLM's online quantization: (I W^T)^T, whatever the layout."""
        self._loader.check_complete()
        unit = torch.eye(self._shape[1], dtype=self._dtype, device=self._device)
        return torch.cat([self.apply(layer, rows) for rows in torch.split(unit, UNIT_ROWS)]).T.contiguous()
