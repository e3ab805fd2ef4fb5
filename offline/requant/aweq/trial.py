"""Tries out roundings inside a block: how much worse do its outputs become?"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from requant_kernels.rounding import rtn
from requant_kernels.scheme import ActivationScheme, LayerScheme, WeightScheme
from torch import nn

from requant.aweq.error import token_weights, weighted_error
from requant.aweq.installed import RoundInput
from requant.aweq.settings import RangeMethod
from requant.aweq.static_range import static_range
from requant.walk import hooked, run_block

TOKENS = 512  # on which choices are compared: the order of errors is plain long before more tokens

# the weight of each token of a sample -> a forward pre-hook
InputRounding = Callable[[torch.Tensor], Any]


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
    def error(self, weights: Mapping[str, WeightScheme], inputs: Mapping[str, InputRounding]) -> float:
        """With these layers' weights rounded to nearest and these layers' inputs rounded: weighed squared error."""
        with restored(self.block, tuple(weights)):
            for name, scheme in weights.items():
                weight = self.block.get_parameter(f"{name}.weight")
                weight.copy_(rtn.quantize(weight.detach(), scheme, dtype=torch.float32).dequantize())
            return weighted_error(self._outputs(inputs), self.outputs, self.weights)

    def _outputs(self, inputs: Mapping[str, InputRounding]) -> Iterator[torch.Tensor]:
        for hidden, weights in zip(self.hidden, self.weights, strict=True):
            with hooked({self.block.get_submodule(name): rounding(weights) for name, rounding in inputs.items()}):
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


def input_rounding(scheme: LayerScheme, method: RangeMethod) -> InputRounding:
    """How a layer of ``scheme``, W8A8, will round its input; where its step is static, ``method`` finds one for each
    sample, which stands for the one that is still to be found."""
    activations = scheme.activations
    assert activations is not None
    if activations.dynamic:
        return lambda _: RoundInput(activations)
    return lambda weights: _RoundByRange(activations, method, weights)


def as_given(rounding: RoundInput) -> InputRounding:
    """The same for every sample."""
    return lambda _: rounding


@dataclass(frozen=True)
class _RoundByRange:
    scheme: ActivationScheme
    method: RangeMethod
    weights: torch.Tensor

    def __call__(self, module: nn.Linear, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        x = args[0].flatten(0, -2)
        if not bool(x.any()):
            return args
        static = static_range(
            x,
            self.method,
            symmetric=self.scheme.symmetric,
            dtype=torch.float32,
            weights=torch.outer(self.weights, module.weight.square().sum(0)),
        )
        return RoundInput(self.scheme, static.scale, static.zero_point)(module, args)
