"""Any exact int8 product of PyTorch, with rounding before and scaling after it in plain torch."""

from functools import cached_property

import torch

from requant_kernels.prepared import Prepared
from requant_kernels.w8a8.interface import Implementation, LayerConfig
from requant_kernels.w8a8.products import Product
from requant_kernels.w8a8.runtime import Runtime
from requant_kernels.w8a8.weight import W8A8Weight


class Accumulating(Implementation):
    """One implementation for each product: its sums, then times the steps, plus the bias."""

    def __init__(self, product: Product) -> None:
        self.name, self.readable, self._product = product.name, product.readable, product

    def can_implement(self, config: LayerConfig) -> tuple[bool, str]:
        if config.device.type not in self._product.devices:
            return False, f"runs on a CPU, not on {config.device.type}"
        return not self._missing, self._missing

    @cached_property
    def _missing(self) -> str:
        return self._product.unavailable()

    def prepare(self, weight: W8A8Weight, config: LayerConfig) -> Prepared:
        """weight: what the product makes of the codes."""
        there = weight.to(config.device)
        runtime = Runtime.of(there, self._product.pack(there.codes), there.scale.float())
        tensors, meta = runtime.store()
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
        sums = self._product.multiply(codes, layer.weight)
        if not layer.scheme.symmetric:
            sums = sums - zero_point * layer.weight_sums
        y = sums * scale * layer.weight_scale
        if bias is not None:
            y += bias
        return y.to(x.dtype)
