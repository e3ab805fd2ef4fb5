"""Rounds the input: with vLLM's fused CPU operators where they are loaded and equal the definition, else by it."""

from functools import cache

import torch

from requant_kernels.reference import QuantizedInput, quantize_input
from requant_kernels.scheme import ActivationScheme


def round_input(
    x: torch.Tensor, scheme: ActivationScheme, scale: torch.Tensor | None, zero_point: torch.Tensor | None
) -> QuantizedInput:
    """``quantize_input`` of the reference, bit for bit: x [M, K]; scale fp32 [1] and zero_point [1] where static."""
    if scheme.symmetric and x.device.type == "cpu" and fused_is_exact():
        return _fused(x, scale)
    return quantize_input(x, scheme, scale, zero_point)


def _fused(x: torch.Tensor, scale: torch.Tensor | None) -> QuantizedInput:
    codes = torch.empty_like(x, dtype=torch.int8)
    if scale is None:
        scale = torch.empty(x.shape[0], 1, dtype=torch.float32)
        torch.ops._C.dynamic_scaled_int8_quant(codes, x, scale, None)
    else:
        torch.ops._C.static_scaled_int8_quant(codes, x, scale, None)
    return QuantizedInput(codes, scale, torch.zeros(1, 1, dtype=torch.int32))


@cache
def fused_is_exact() -> bool:
    """Whether vLLM's CPU operators are loaded into this process and round as the reference does, ties included."""
    if not hasattr(torch.ops._C, "dynamic_scaled_int8_quant"):
        return False
    noise = torch.randn(64, 93, generator=torch.Generator().manual_seed(0))
    x = torch.cat((_half_steps(), noise, torch.zeros(1, 93)))
    dynamic = quantize_input(x, ActivationScheme(dynamic=True))
    one = torch.ones(1)
    static = quantize_input(x, ActivationScheme(dynamic=False), one)
    fused = _fused(x, None)
    return (
        torch.equal(fused.codes, dynamic.codes)
        and torch.equal(fused.scale, dynamic.scale)
        and torch.equal(_fused(x, one).codes, static.codes)
    )


def _half_steps() -> torch.Tensor:
    """fp32 [2, 93] with step 1: nearly every value lies halfway between two codes."""
    row = torch.arange(93) - 46.5
    row[0] = 127
    return torch.stack((row, -row))
