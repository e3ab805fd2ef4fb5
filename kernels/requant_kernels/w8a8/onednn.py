"""vLLM's CPU operators over oneDNN: the product with both steps and the bias in one pass.

Fast where the processor has VNNI instructions, refused where it has not (saturation.py). They are there only in a
process into which vLLM has loaded its CPU operators: this package never imports vLLM.
"""

from functools import cache

import torch

from requant_kernels.prepared import Prepared
from requant_kernels.w8a8 import saturation
from requant_kernels.w8a8.interface import Implementation, LayerConfig
from requant_kernels.w8a8.runtime import Runtime
from requant_kernels.w8a8.weight import W8A8Weight

CACHED_PRIMITIVES = 32  # numbers of tokens for which a layer keeps oneDNN's code: vLLM's own choice


class OneDnn(Implementation):
    name = "onednn"

    def can_implement(self, config: LayerConfig) -> tuple[bool, str]:
        if config.device.type != "cpu":
            return False, f"runs on a CPU, not on {config.device.type}"
        missing = _unavailable()
        return not missing, missing

    def prepare(self, weight: W8A8Weight, config: LayerConfig) -> Prepared:
        """weight int64 []: the address of the packed weight, which lives as long as the process and reads its steps
        from ``weight_scale``."""
        scale = weight.scale.float().clone()
        symmetric, dynamic = config.activations.symmetric, config.activations.dynamic
        handler = _pack(weight.codes, scale, config.dtype, dynamic, symmetric)
        tensors, meta = Runtime.of(weight, handler, scale).store()
        return Prepared(self.name, weight.out_features, tensors, meta)

    def apply(
        self,
        x: torch.Tensor,
        tensors: list[torch.Tensor],
        bias: torch.Tensor | None,
        out_features: int,
        meta: list[int],
    ) -> torch.Tensor:
        layer = Runtime.load(tensors, meta)
        codes, scale, zero_point = layer.round(x)
        zero, sums = None, None
        if not layer.scheme.symmetric:
            zero = layer.input_zero_point if layer.input_zero_point is not None else zero_point
            sums = layer.weight_sums * layer.weight_scale if layer.scheme.dynamic else None
        if layer.input_scale is not None:
            scale = layer.input_scale
        out = x.new_empty(x.shape[0], out_features)
        if bias is not None:
            bias = bias.to(x.dtype)  # the operator reads it as that, whatever it is
        torch.ops._C.onednn_scaled_mm(out, codes, scale, zero, sums, bias, layer.weight)
        return out


def _pack(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, dynamic: bool, symmetric: bool) -> torch.Tensor:
    """int64 []. The operator keeps the address of ``scale`` fp32 [N], which must therefore outlive it."""
    handler = torch.ops._C.create_onednn_scaled_mm_handler(
        codes.t(), scale, dtype, dynamic, not symmetric, CACHED_PRIMITIVES
    )
    return torch.tensor(handler)


@cache
def _unavailable() -> str:
    if not hasattr(torch.ops._C, "onednn_scaled_mm"):
        return "vLLM's CPU operators are not loaded"

    def multiply(codes: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        steps, ones = torch.ones(len(weight)), torch.ones(len(codes), 1)
        handler = _pack(weight, steps, torch.float32, dynamic=True, symmetric=True)
        out = torch.empty(len(codes), len(weight))
        torch.ops._C.onednn_scaled_mm(out, codes, ones, None, None, None, handler)
        return out

    return saturation.unavailable(multiply)
