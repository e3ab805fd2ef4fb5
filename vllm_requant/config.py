"""``quantization_config`` of a checkpoint -> a method for each layer of the model."""

from typing import Any

import torch
import vllm
from requant_kernels.errors import SchemeError
from requant_kernels.scheme import QUANT_METHOD, CheckpointScheme, LayerScheme
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from vllm_requant.versions import check_version


class RequantConfig(QuantizationConfig):  # type: ignore[misc]
    """What vLLM asks about a requant checkpoint."""

    def __init__(self, scheme: CheckpointScheme) -> None:
        super().__init__()
        self.scheme = scheme
        self.mappers: list[Any] = []

    def __repr__(self) -> str:
        return f"RequantConfig({self.scheme})"

    @classmethod
    def get_name(cls) -> str:
        return QUANT_METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0  # decoding to an ordinary matrix runs wherever torch does

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "RequantConfig":
        """Raises RuntimeError for an untested vLLM, SchemeError for a configuration that is not understood."""
        check_version(vllm.__version__)
        return cls(CheckpointScheme.from_dict(config))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self.mappers.append(hf_to_vllm_mapper)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        # These modules import all of vLLM's layers, which a plugin must not do while it registers.
        from vllm.model_executor.layers.fused_moe import RoutedExperts
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        from vllm_requant.linear import DenseSparseLinearMethod, W8A8LinearMethod
        from vllm_requant.moe import experts_method
        from vllm_requant.names import unfused

        if isinstance(layer, LinearBase):
            names = unfused(prefix, self.packed_modules_mapping)
            scheme = self._common_scheme(prefix, names)
            if scheme is None:
                return UnquantizedLinearMethod()
            return (W8A8LinearMethod if scheme.activations else DenseSparseLinearMethod)(scheme, names)
        if isinstance(layer, RoutedExperts):
            return experts_method(layer, prefix, self._common_scheme)
        if isinstance(layer, ParallelLMHead) and self._common_scheme(prefix, [prefix]) is not None:
            raise SchemeError(f"{prefix}: a quantized output layer can not be served; quantize with it in 'ignore'")
        return None

    def _common_scheme(self, prefix: str, names: list[str]) -> LayerScheme | None:
        """The scheme of the layers ``names`` that vLLM fuses into ``prefix``. Raises SchemeError where they differ."""
        from vllm_requant.names import scheme_of

        schemes = [scheme_of(name, self.scheme, self.mappers) for name in names]
        for name, scheme in zip(names, schemes, strict=True):
            if scheme != schemes[0]:
                raise SchemeError(
                    f"{prefix}: vLLM fuses {names[0]} and {name}, so both must be quantized alike or both ignored"
                )
        return schemes[0]
