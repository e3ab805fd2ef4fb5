"""Other kernels for weights of few bits, where they can be imported: vLLM's own (Machete, Marlin, Exllama, Triton, and
through it conch and humming) and gemlite. Each multiplies by the codes and steps that our kernel has, without entries,
and is checked against the same reference before it is timed.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, partial
from itertools import product
from typing import Any, Self

import torch
from requant_kernels.packing import WORD
from requant_kernels.weight import DenseSparseWeight

from benchmarks.kernel_timing import layers
from benchmarks.kernel_timing.cells import Cell, cell, twice
from benchmarks.kernel_timing.clock import Calls
from benchmarks.kernel_timing.layers import Setting
from benchmarks.kernel_timing.recording import Unit
from benchmarks.kernel_timing.shapes import SCHEMES, Shape

# In the order in which vLLM prefers them on CUDA; the last is for a machine without a GPU.
VLLM_KERNELS = ("Machete", "Marlin", "Conch", "Exllama", "TritonW4A16", "Humming", "CPUWNA16")
Forward = Callable[[torch.Tensor], torch.Tensor]
Make = Callable[[DenseSparseWeight], Forward]


tell = cache(print)  # once for each line


class NotHereError(Exception):
    """A peer can not take part; the text says why."""


def told(name: str, cells: Iterator[Cell]) -> Iterator[Cell]:
    """The cells of a peer; that it can not take part is printed."""
    try:
        yield from cells
    except NotHereError as error:
        tell(f"{name}: not measured: {error}")


@contextlib.contextmanager
def vllm_ready(setting: Setting) -> Iterator[Any]:
    """Inside, vLLM's parameters can be made: its module of linear kernels, in a process group of one. Raises
    NotHereError without vLLM."""
    try:
        from vllm import distributed
        from vllm.config import VllmConfig, set_current_vllm_config
        from vllm.model_executor.kernels import linear
    except ImportError as error:
        raise NotHereError(f"vLLM: {error}") from None
    backend = "nccl" if setting.device.type == "cuda" else "gloo"
    with tempfile.TemporaryDirectory() as folder, set_current_vllm_config(VllmConfig()):
        distributed.init_distributed_environment(1, 0, f"file://{folder}/rendezvous", 0, backend)
        distributed.initialize_model_parallel(1)
        try:
            yield linear
        finally:
            distributed.destroy_model_parallel()
            distributed.destroy_distributed_environment()


def vllm_layer(weight: DenseSparseWeight) -> torch.nn.Module:
    """A layer as vLLM loads it from a checkpoint of llm-compressor: the words of our file are the same."""
    from vllm.model_executor.parameter import GroupQuantScaleParameter, PackedvLLMParameter

    assert weight.scale is not None
    layer: Any = torch.nn.Module()
    layer.weight_packed = PackedvLLMParameter(
        data=weight.packed.clone(),
        input_dim=1,
        output_dim=0,
        packed_dim=1,
        packed_factor=Fraction(WORD, weight.scheme.weights.bits),
        weight_loader=lambda *_: None,
    )
    layer.weight_scale = GroupQuantScaleParameter(
        data=weight.scale.clone(), input_dim=1, output_dim=0, weight_loader=lambda *_: None
    )
    layer.bias = None
    # what vLLM's kernels read of a linear layer beside its parameters
    layer.params_dtype = weight.scale.dtype
    layer.input_size = layer.input_size_per_partition = weight.in_features
    layer.output_size = layer.output_size_per_partition = weight.out_features
    layer.output_partition_sizes = [weight.out_features]
    layer.has_bias = False
    return layer


def vllm_kernel(linear: Any, name: str, weight: DenseSparseWeight) -> Forward:
    """Raises NotHereError where the kernel does not take this layer on this machine."""
    from vllm.scalar_type import scalar_types

    bits, scale = weight.scheme.weights.bits, weight.scale
    assert scale is not None
    kind = getattr(linear, f"{name}LinearKernel", None)
    if kind is None:
        raise NotHereError("this vLLM has no such kernel")
    size = (weight.in_features, weight.out_features)
    biased = {2: scalar_types.uint2b2, 3: scalar_types.uint3b4, 4: scalar_types.uint4b8}[bits]
    config = linear.MPLinearLayerConfig(size, size, biased, scale.dtype, weight.group_size, zero_points=False)
    able, reason = kind.can_implement(config)
    if not able:
        raise NotHereError(reason)
    kernel, layer = kind(config, "weight_packed", "weight_scale", "weight_zero_point"), vllm_layer(weight)
    kernel.process_weights_after_loading(layer)
    forward: Forward = partial(kernel.apply_weights, layer)
    return forward


def gemlite(weight: DenseSparseWeight) -> Forward:
    """Raises NotHereError without the package, and where it does not take this layer."""
    try:
        from gemlite.helper import A16Wn
    except ImportError as error:
        raise NotHereError(str(error)) from None
    bits, scale = weight.scheme.weights.bits, weight.scale
    assert scale is not None
    if bits == 3:
        raise NotHereError("gemlite has 1, 2, 4 and 8 bits")
    zeros = torch.full_like(scale, weight.scheme.weights.midpoint)
    made = A16Wn(device=str(scale.device), dtype=scale.dtype).from_weights(
        weight.codes(), scale, zeros, bits, weight.group_size
    )
    forward: Forward = made.forward
    return forward


@dataclass(frozen=True)
class Given:
    """What every peer is handed for a layer and a scheme of SCHEMES; ``exact``: its weight, fp32 [N, K]."""

    shape: Shape
    scheme: str
    weight: DenseSparseWeight
    exact: torch.Tensor

    @classmethod
    def of(cls, shape: Shape, scheme: str, setting: Setting) -> Self:
        weight = layers.random_weight(shape, *SCHEMES[scheme], 0.0, setting)
        return cls(shape, scheme, weight, layers.exact_weight(weight))

    def cells(self, name: str, make: Make, tokens: Sequence[int], setting: Setting) -> Iterator[Cell]:
        """Raises NotHereError from ``make``; ArithmeticError where it computes something else than the reference."""
        stored = layers.size(list(self.weight.to_tensors().values()))
        copies = [make(self.weight) for _ in range(layers.rotations(stored, setting))]
        for count in tokens:
            x = layers.activations(count, self.shape, setting)
            error = layers.check(copies[0](x), x, self.exact)
            calls: Calls = [partial(forward, x) for forward in copies]
            yield cell(self.shape, f"{name} {self.scheme}", count, twice(calls, setting), stored, error=error)


class Peers:
    """The kernels that take part, by name: gemlite, and vLLM's once ``begin`` has found them."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._makes: dict[str, Make] = {"gemlite": gemlite}

    def begin(self, stack: contextlib.ExitStack) -> Iterator[Cell]:
        """Makes vLLM ready until ``stack`` ends, a unit of work without cells: whatever vLLM raises costs its kernels
        alone. Its absence is printed."""
        try:
            linear = stack.enter_context(vllm_ready(self._setting))
        except NotHereError as error:
            tell(f"not measured: {error}")
        else:
            self._makes |= {name: partial(vllm_kernel, linear, name) for name in VLLM_KERNELS}
        yield from ()

    def units(self, shapes: Sequence[Shape], schemes: Sequence[str], tokens: Sequence[int]) -> Iterator[Unit]:
        """Every peer on every layer, whose weight is made once for all of them. What a peer can not do is printed,
        once for each reason."""
        for scheme, shape in product(schemes, shapes):
            given = cache(partial(Given.of, shape, scheme, self._setting))
            for name, make in self._makes.items():
                measured = self._cells(given, name, make, tokens)
                yield Unit(f"{shape} {name} {scheme}", told(f"{name} {scheme}", measured))

    def _cells(self, given: Callable[[], Given], name: str, make: Make, tokens: Sequence[int]) -> Iterator[Cell]:
        yield from given().cells(name, make, tokens, self._setting)
