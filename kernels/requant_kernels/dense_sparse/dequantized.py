"""The path that always works: decode once at load, then an ordinary matrix product."""

import torch

from requant_kernels.dense_sparse.interface import Implementation, LayerConfig
from requant_kernels.prepared import Prepared
from requant_kernels.reference import dequantize
from requant_kernels.weight import DenseSparseWeight


class Dequantized(Implementation):
    """Any scheme, device and float dtype; takes the memory of an unquantized layer."""

    name = "dequantized"

    def can_implement(self, config: LayerConfig) -> tuple[bool, str]:
        if not config.dtype.is_floating_point:
            return False, f"activations of {config.dtype} are not floating point"
        return True, ""

    def prepare(self, weight: DenseSparseWeight, config: LayerConfig) -> Prepared:
        """weight [N, K] in the dtype of the activations."""
        dense = dequantize(weight.to(config.device)).to(config.dtype)
        return Prepared(self.name, weight.out_features, {"weight": dense})

    def apply(
        self,
        x: torch.Tensor,
        tensors: list[torch.Tensor],
        bias: torch.Tensor | None,
        out_features: int,
        meta: list[int],
    ) -> torch.Tensor:
        return torch.nn.functional.linear(x, tensors[0], bias)
