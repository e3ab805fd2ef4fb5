"""What a layer that has been laid out for running is, and what runs it, whichever operation it belongs to."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class Prepared:
    """A layer in an implementation's own runtime layout: built at load time, never written to a file.

    ``tensors`` (in this order) and ``meta`` are what the operator passes back to ``apply``. The codes are called weight
    or weight_packed: LoRA looks for one of the two.
    """

    implementation: str
    out_features: int
    tensors: dict[str, torch.Tensor]
    meta: tuple[int, ...] = ()


class Runs(Protocol):
    """The half of an implementation that works while serving."""

    name: str
    # Whether torch.compile may look into ``apply``: where it is one registered operator, whatever the shape of x.
    traceable: bool = False

    def apply(
        self,
        x: torch.Tensor,
        tensors: list[torch.Tensor],
        bias: torch.Tensor | None,
        out_features: int,
        meta: list[int],
    ) -> torch.Tensor:
        """x [M, K] contiguous -> [M, N] of x's dtype. No host synchronisation; branches on shapes only."""
        ...

    def warm_up(
        self, prepared: Prepared, dtype: torch.dtype, device: torch.device, *, limit: int, biased: Collection[bool]
    ) -> None:
        """Compiles whatever serving ``prepared`` with up to ``limit`` tokens can reach, by default nothing. biased:
        whether it gets a bias, doesn't, or both."""
        return None
