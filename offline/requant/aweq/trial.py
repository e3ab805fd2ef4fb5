"""Tries out roundings inside a block: how much worse do its outputs become?"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from requant_kernels.rounding import rtn
from requant_kernels.scheme import WeightScheme
from torch import nn

from requant.aweq.error import token_weights, weighted_error
from requant.aweq.installed import RoundInput
from requant.walk import hooked, run_block

TOKENS = 512  # on which choices are compared: the order of errors is plain long before more tokens


@dataclass(frozen=True)
class Trial:
    """``block`` computes in fp32; ``outputs`` [B, T, C]: what it makes of ``hidden`` unrounded; ``weights``: of their
    tokens (error.py)."""

    block: nn.Module
    hidden: Sequence[torch.Tensor]
    outputs: Sequence[torch.Tensor]
    weights: Sequence[torch.Tensor]
    keywords: Mapping[str, Any]

    @classmethod
    def of(
        cls, block: nn.Module, hidden: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor], keywords: dict[str, Any]
    ) -> Self:
        """On the first samples alone."""
        few = max(1, TOKENS // hidden[0].shape[:-1].numel())
        return cls(block, hidden[:few], outputs[:few], token_weights(outputs[:few]), keywords)

    @torch.no_grad()
    def error(self, weights: Mapping[str, WeightScheme], inputs: Mapping[str, RoundInput]) -> float:
        """With these layers' weights rounded to nearest and these layers' inputs rounded: weighed squared error."""
        with restored(self.block, tuple(weights)):
            for name, scheme in weights.items():
                weight = self.block.get_parameter(f"{name}.weight")
                weight.copy_(rtn.quantize(weight.detach(), scheme, dtype=torch.float32).dequantize())
            return weighted_error(self._outputs(inputs), self.outputs, self.weights)

    def _outputs(self, inputs: Mapping[str, RoundInput]) -> Iterator[torch.Tensor]:
        with hooked({self.block.get_submodule(name): rounding for name, rounding in inputs.items()}):
            for hidden in self.hidden:
                yield run_block(self.block, hidden, self.keywords)


@contextmanager
def restored(block: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Gives the parameters of the modules ``names`` back their values on leaving."""
    parameters = [parameter for name in names for parameter in block.get_submodule(name).parameters()]
    before = [parameter.detach().clone() for parameter in parameters]
    try:
        yield
    finally:
        for parameter, value in zip(parameters, before, strict=True):
            parameter.data.copy_(value)
