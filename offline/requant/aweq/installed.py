"""A quantized layer at work inside a transformers model, in fp32: what a server computes, on any device."""

from typing import Self

import torch
from requant_kernels.layer import QuantizedLayer
from requant_kernels.reference import dequantize, quantize_input
from requant_kernels.scheme import ActivationScheme
from requant_kernels.w8a8.weight import W8A8Weight
from torch import nn


class RoundInput:
    """A forward pre-hook: the input becomes what its int8 codes mean. Static steps are one scale [1] and, where
    asymmetric, one zero point [1]."""

    def __init__(
        self, scheme: ActivationScheme, scale: torch.Tensor | None = None, zero_point: torch.Tensor | None = None
    ) -> None:
        self._scheme, self._scale, self._zero_point = scheme, scale, zero_point

    @classmethod
    def of(cls, layer: QuantizedLayer) -> Self | None:
        """None for a layer that takes its input as it is."""
        if not isinstance(layer, W8A8Weight):
            return None
        assert layer.scheme.activations is not None
        return cls(layer.scheme.activations, layer.input_scale, layer.input_zero_point)

    def round(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] -> [..., K] of the same dtype."""
        steps = (None if step is None else step.to(x.device) for step in (self._scale, self._zero_point))
        return quantize_input(x, self._scheme, *steps).dequantize().to(x.dtype)

    def __call__(self, module: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return (self.round(args[0]),)


@torch.no_grad()
def install(linear: nn.Linear, layer: QuantizedLayer) -> None:
    """Makes ``linear`` compute what ``layer`` means: decoded weight, rounded input, corrected bias."""
    linear.weight.copy_(dequantize(layer))
    install_around(linear, layer)


@torch.no_grad()
def install_around(linear: nn.Linear, layer: QuantizedLayer) -> None:
    """All but the weight."""
    correct(linear, layer)
    if rounds := RoundInput.of(layer):
        linear.register_forward_pre_hook(rounds)


@torch.no_grad()
def correct(linear: nn.Linear, layer: QuantizedLayer) -> None:
    """The bias correction alone, if there is one. A bias is created where there is none."""
    if layer.bias_correction is None:
        return
    correction = layer.bias_correction.to(linear.weight)
    bias = correction if linear.bias is None else linear.bias + correction
    linear.bias = nn.Parameter(bias, requires_grad=False)
