"""What a W8A8 kernel is tried on: built and compared in the process that runs the kernel."""

from dataclasses import dataclass, replace

import torch
from requant_kernels.reference import quantize_input, w8a8_linear
from requant_kernels.scheme import ActivationScheme
from requant_kernels.w8a8.interface import LayerConfig
from requant_kernels.w8a8.triton.implementation import Triton
from requant_kernels.w8a8.triton.table import Table, Tile

from tests.kernels.strategies import random_w8a8

FUSED = Tile("fused", 16, tokens=16, rows=32, columns=64, warps=4, stages=2, programs=1)
PRODUCT = Tile("product", None, tokens=32, rows=32, columns=64, warps=4, stages=2, programs=1, group=2)
SPLIT = 64  # programs: enough to split the columns of every case


@dataclass(frozen=True)
class Case:
    tokens: int
    rows: int
    columns: int
    dynamic: bool = True
    symmetric: bool = True
    bias: bool = True
    product: bool = False
    split: bool = False
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def table(self) -> Table:
        programs = SPLIT if self.split else 1
        tiles = (replace(PRODUCT, programs=programs),)
        if not self.product:
            tiles = (replace(FUSED, programs=programs), *tiles)
        return Table((), "", tiles, round_block=64, round_warps=4)


def check(case: Case) -> None:
    """The kernel's y is the reference's to the rounding of the scaling: its integers are exact."""
    activations = ActivationScheme(dynamic=case.dynamic, symmetric=case.symmetric)
    weight = random_w8a8(activations, (case.rows, case.columns), dtype=torch.float32)
    weight.codes[case.rows // 2] = 0  # a row that reads nothing
    generator = torch.Generator().manual_seed(case.tokens)
    x = torch.randn(case.tokens, case.columns, generator=generator) * 3
    x[case.tokens // 2] = 0
    x = x.to(case.dtype)
    bias = torch.randn(case.rows, generator=generator).to(case.dtype) if case.bias else None
    expected = w8a8_linear(x.float(), weight, bias)

    implementation, device = Triton(case.table()), torch.device(case.device)
    prepared = implementation.prepare(weight, LayerConfig.of(weight, case.dtype, device))
    tensors = [tensor.to(device) for tensor in prepared.tensors.values()]
    moved = None if bias is None else bias.to(device)
    y = implementation.apply(x.to(device), tensors, moved, case.rows, list(prepared.meta)).cpu()

    assert y.dtype == case.dtype
    assert not tensors[-1].any(), "the count of shares is not back at zero"
    codes, scale, zero = quantize_input(x, activations, weight.input_scale, weight.input_zero_point)
    terms = (codes.float().abs() + zero.abs()) @ weight.codes.float().abs().T * scale * weight.scale
    rounding = torch.finfo(case.dtype).eps * expected.abs() + 4 * torch.finfo(torch.float32).eps * terms
    rounding += torch.finfo(torch.float32).eps * (0 if bias is None else bias.float().abs()) + 1e-30
    assert bool(((y.float() - expected).abs() <= rounding).all()), (y.float() - expected).abs().max()


def check_rounding(case: Case) -> None:
    """Codes, scales and zero points of the rounding kernel are the reference's, bit for bit."""
    from requant_kernels.w8a8.runtime import Runtime
    from requant_kernels.w8a8.triton import launch

    activations = ActivationScheme(dynamic=case.dynamic, symmetric=case.symmetric)
    weight = random_w8a8(activations, (8, case.columns), dtype=torch.float32)
    generator = torch.Generator().manual_seed(case.tokens)
    x = (torch.randn(case.tokens, case.columns, generator=generator) * 3).to(case.dtype)
    x[0] = (torch.arange(case.columns) % 200 - 99.5).to(case.dtype)  # halves
    device = torch.device(case.device)
    layer = Runtime.of(weight.to(device), weight.codes, weight.scale)
    steps = (torch.empty(case.tokens, device=device), torch.empty(case.tokens, dtype=torch.int32, device=device))
    arrived = torch.zeros(0, dtype=torch.int32, device=device)
    codes = launch._Call(x.to(device), layer, arrived, None, case.table()).round(steps).cpu()
    defined = quantize_input(x, activations, weight.input_scale, weight.input_zero_point)
    assert torch.equal(codes, defined.codes)
    assert torch.equal(steps[0].cpu(), defined.scale.flatten())
    assert torch.equal(steps[1].cpu(), defined.zero_point.flatten())
