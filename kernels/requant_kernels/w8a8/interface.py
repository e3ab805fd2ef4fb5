"""What an implementation of the W8A8 linear layer offers, so that a layer and a kernel meet only here."""

from dataclasses import dataclass
from typing import Protocol

import torch

from requant_kernels.prepared import Prepared, Runs
from requant_kernels.scheme import ActivationScheme
from requant_kernels.w8a8.weight import W8A8Weight


@dataclass(frozen=True)
class LayerConfig:
    """All that dispatch may look at: the layer as it lies on this rank, and where it is to run."""

    activations: ActivationScheme
    out_features: int
    in_features: int
    dtype: torch.dtype  # of x and y
    device: torch.device

    @classmethod
    def of(cls, weight: W8A8Weight, dtype: torch.dtype, device: torch.device) -> "LayerConfig":
        assert weight.scheme.activations is not None
        return cls(weight.scheme.activations, weight.out_features, weight.in_features, dtype, device)


class Implementation(Runs, Protocol):
    readable: bool = False  # whether codes can be had back from the runtime layout, for embeddings

    def can_implement(self, config: LayerConfig) -> tuple[bool, str]:
        """(True, "") or (False, the reason in words that a user can act on)."""
        ...

    def prepare(self, weight: W8A8Weight, config: LayerConfig) -> Prepared:
        """The runtime layout on ``config.device``. The bias correction is left to the caller: a bias like any other."""
        ...

    def codes(self, weight: torch.Tensor, rows: torch.Tensor, in_features: int) -> torch.Tensor:
        """Those of the rows int64 [...], [..., K] of any dtype, from the tensor ``weight`` of a readable layout."""
        return weight[rows]
