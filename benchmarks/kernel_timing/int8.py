"""W8A8 layers: each way of rounding inputs, checked first, beside the vendor's and vLLM's int8 products."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from requant_kernels import reference
from requant_kernels.prepared import Prepared
from requant_kernels.scheme import W8A8_WEIGHTS, ActivationScheme, LayerScheme
from requant_kernels.w8a8.interface import LayerConfig
from requant_kernels.w8a8.triton.implementation import Triton
from requant_kernels.w8a8.triton.table import Table, Tile
from requant_kernels.w8a8.weight import W8A8Weight

from benchmarks.kernel_timing import layers
from benchmarks.kernel_timing.cells import Cell, cell, twice
from benchmarks.kernel_timing.clock import Calls
from benchmarks.kernel_timing.layers import Setting
from benchmarks.kernel_timing.peers import NotHereError, told
from benchmarks.kernel_timing.shapes import Shape

SCHEMES = {
    "W8A8 dynamic": ActivationScheme(dynamic=True),
    "W8A8 zero point": ActivationScheme(dynamic=True, symmetric=False),
    "W8A8 static": ActivationScheme(dynamic=False),
}
LEAST_TOKENS = 17  # of torch._int_mm on a GPU
# Without a GPU: large tiles, so that there are few programs.
INTERPRETED = Table(
    (),
    "the interpreter",
    (
        Tile("fused", up_to=16, tokens=16, rows=64, columns=128, warps=4, stages=2, programs=1),
        Tile("product", up_to=None, tokens=64, rows=64, columns=128, warps=4, stages=2, programs=1),
    ),
    round_block=256,
    round_warps=4,
)


def random_weight(shape: Shape, activations: ActivationScheme, setting: Setting) -> W8A8Weight:
    """Uniform codes, steps around 0.01; a static step that normal inputs exceed now and then."""
    device, rows = setting.device, shape.rows
    generator = torch.Generator(device).manual_seed(0)
    size = (rows, shape.columns)
    codes = torch.randint(-127, 128, size, dtype=torch.int8, device=device, generator=generator)
    scale = torch.rand(rows, device=device, generator=generator) * 0.01 + 0.005
    step = None if activations.dynamic else torch.tensor([3 / 127], device=device)
    return W8A8Weight(LayerScheme(W8A8_WEIGHTS, None, activations), codes, scale.to(setting.dtype), step)


def prepare(weight: W8A8Weight, setting: Setting) -> tuple[Triton, Prepared]:
    implementation = Triton(None if setting.device.type == "cuda" else INTERPRETED)
    return implementation, implementation.prepare(weight, LayerConfig.of(weight, setting.dtype, setting.device))


def run_once(name: str, shape: Shape, tokens: Sequence[int], setting: Setting) -> None:
    """Runs what ``ours`` measures once, so that it is compiled."""
    layers.run_once(*prepare(random_weight(shape, SCHEMES[name], setting), setting), shape, tokens, setting)


def ours(name: str, shape: Shape, tokens: Sequence[int], setting: Setting) -> Iterator[Cell]:
    """Raises ArithmeticError where a kernel computes something else than the reference."""
    weight = random_weight(shape, SCHEMES[name], setting)
    implementation, prepared = prepare(weight, setting)
    copies = layers.rotated(list(prepared.tensors.values()), setting)
    for count in tokens:
        x = layers.activations(count, shape, setting)
        calls = layers.calls(implementation, prepared, copies, x)
        error = layers.relative_error(calls[0](), reference.w8a8_linear(x.float(), weight))
        yield cell(shape, name, count, twice(calls, setting), layers.size(copies[0]), error=error)


def vendor(shape: Shape, tokens: Sequence[int], setting: Setting) -> Iterator[Cell]:
    """The int8 product of inputs that are rounded already, its int32 sums as they are."""
    weight = random_weight(shape, SCHEMES["W8A8 dynamic"], setting).codes
    copies = [tensors[0].t() for tensors in layers.rotated([weight], setting)]
    for count in (one for one in tokens if one >= LEAST_TOKENS):
        x = torch.ones(count, shape.columns, dtype=torch.int8, device=setting.device)
        calls: Calls = [partial(torch._int_mm, x, copy) for copy in copies]
        yield cell(shape, "cuBLAS int8", count, twice(calls, setting), layers.size([weight]))


def cutlass(shape: Shape, tokens: Sequence[int], setting: Setting) -> Iterator[Cell]:
    """vLLM's W8A8 layer with dynamic steps: rounding, then cutlass. Raises NotHereError where vLLM has none, and
    ArithmeticError where it computes something else than the reference."""
    try:
        from vllm import _custom_ops as vllm_ops
    except ImportError as error:
        raise NotHereError(str(error)) from None
    if not hasattr(torch.ops._C, "cutlass_scaled_mm"):
        raise NotHereError("this build of vLLM has no such operator")
    weight = random_weight(shape, SCHEMES["W8A8 dynamic"], setting)
    copies = layers.rotated([weight.codes, weight.scale.float()], setting)

    def call(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        rounded, step, _ = vllm_ops.scaled_int8_quant(x)
        made: torch.Tensor = vllm_ops.cutlass_scaled_mm(rounded, codes.t(), step, scale[:, None], x.dtype)
        return made

    for count in tokens:
        x = layers.activations(count, shape, setting)
        calls: Calls = [partial(call, x, *tensors) for tensors in copies]
        wrong = layers.relative_error(calls[0](), reference.w8a8_linear(x.float(), weight))
        yield cell(shape, "vLLM cutlass", count, twice(calls, setting), layers.size(copies[0]), error=wrong)


def cutlass_if_there(shape: Shape, tokens: Sequence[int], setting: Setting) -> Iterator[Cell]:
    """Where vLLM has none, that is printed."""
    return told("vLLM cutlass", cutlass(shape, tokens, setting))


# What is measured of a layer, the most important first.
KERNELS: dict[str, Callable[[Shape, Sequence[int], Setting], Iterator[Cell]]] = {
    "W8A8 dynamic": partial(ours, "W8A8 dynamic"),
    "cuBLAS int8": vendor,
    "vLLM cutlass": cutlass_if_there,
    "W8A8 zero point": partial(ours, "W8A8 zero point"),
    "W8A8 static": partial(ours, "W8A8 static"),
}
