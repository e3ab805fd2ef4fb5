"""What an implementation of the dense-plus-sparse linear layer offers, so that a layer and a kernel meet only here."""

from dataclasses import dataclass
from typing import Protocol

import torch

from requant_kernels.prepared import Prepared, Runs
from requant_kernels.scheme import LayerScheme
from requant_kernels.weight import DenseSparseWeight


@dataclass(frozen=True)
class LayerConfig:
    """All that dispatch may look at: the layer as it lies on this rank, and where it is to run."""

    scheme: LayerScheme
    out_features: int
    in_features: int
    group_size: int
    stored_dtype: torch.dtype  # of scales, levels and sparse values
    dtype: torch.dtype  # of activations
    device: torch.device

    @classmethod
    def of(cls, weight: DenseSparseWeight, dtype: torch.dtype, device: torch.device) -> "LayerConfig":
        return cls(
            weight.scheme, weight.out_features, weight.in_features, weight.group_size, weight.dtype, dtype, device
        )


class Implementation(Runs, Protocol):
    def can_implement(self, config: LayerConfig) -> tuple[bool, str]:
        """(True, "") or (False, the reason in words that a user can act on)."""
        ...

    def prepare(self, weight: DenseSparseWeight, config: LayerConfig) -> Prepared:
        """The runtime layout on ``config.device``."""
        ...
