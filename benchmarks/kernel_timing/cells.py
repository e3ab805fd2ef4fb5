"""Measures one layer: every scheme, density and number of tokens, checked first, against its peers."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.kernel_timing import layers
from benchmarks.kernel_timing.clock import Calls, microseconds
from benchmarks.kernel_timing.layers import Setting
from benchmarks.kernel_timing.shapes import SCHEMES, Shape


@dataclass(frozen=True)
class Cell:
    """``micros``: two runs, whose difference is the spread. ``bytes`` moved at least: layer, x, y. ``error`` relative,
    against fp32; None for peers."""

    model: str
    layer: str
    rows: int
    columns: int
    kernel: str
    tokens: int
    micros: tuple[float, float]
    bytes: int
    density: float = 0.0
    error: float | None = None

    @property
    def time(self) -> float:
        return min(self.micros)


def twice(calls: Calls, setting: Setting) -> tuple[float, float]:
    """Microseconds of a call, in two runs."""
    first = microseconds(calls, setting.device)
    return first, microseconds(calls, setting.device) if setting.device.type == "cuda" else first


def cell(shape: Shape, kernel: str, tokens: int, micros: tuple[float, float], stored: int, **more: Any) -> Cell:
    """stored: bytes of the layer."""
    moved = stored + 2 * tokens * (shape.rows + shape.columns)
    place = (shape.model, shape.layer, shape.rows, shape.columns)
    return Cell(*place, kernel, tokens, micros, moved, **more)


def unquantized(shape: Shape, tokens: Sequence[int], setting: Setting) -> Iterator[Cell]:
    """The vendor's library on a plain weight."""
    weight = torch.randn(shape.rows, shape.columns, device=setting.device).to(setting.dtype)
    copies = [tensors[0] for tensors in layers.rotated([weight], setting)]
    for count in tokens:
        x = layers.activations(count, shape, setting)
        calls: Calls = [partial(torch.nn.functional.linear, x, w) for w in copies]
        yield cell(shape, "cuBLAS", count, twice(calls, setting), layers.size([weight]))


def quantized(shape: Shape, scheme: str, density: float, tokens: Sequence[int], setting: Setting) -> Iterator[Cell]:
    """Our kernels; raises ArithmeticError where one computes something else than the reference."""
    weight = layers.random_weight(shape, *SCHEMES[scheme], density, setting)
    implementation = setting.implementation
    prepared = layers.prepare(implementation, weight, setting)
    copies = layers.rotated(list(prepared.tensors.values()), setting)
    exact = layers.exact_weight(weight)
    for count in tokens:
        x = layers.activations(count, shape, setting)
        calls = layers.calls(implementation, prepared, copies, x)
        error = layers.check(calls[0](), x, exact)
        micros = twice(calls, setting)
        yield cell(shape, scheme, count, micros, layers.size(copies[0]), density=density, error=error)


def run_once(shape: Shape, scheme: str, density: float, tokens: Sequence[int], setting: Setting) -> None:
    """Runs what ``quantized`` measures once, so that it is compiled."""
    prepared = layers.prepare(
        setting.implementation, layers.random_weight(shape, *SCHEMES[scheme], density, setting), setting
    )
    layers.run_once(setting.implementation, prepared, shape, tokens, setting)


def separate_sparse(shape: Shape, density: float, tokens: Sequence[int], setting: Setting) -> Iterator[Cell]:
    """The sparse part alone, by the vendor's CSR product: what a second launch would add."""
    dtype = setting.dtype if setting.device.type == "cuda" else torch.float32  # CPUs know no other CSR product
    sparse = layers.random_weight(shape, 4, 128, density, setting).sparse
    assert sparse is not None
    offsets, columns, values = sparse.row_offsets, sparse.columns.to(torch.int32), sparse.values.to(dtype)
    csr = torch.sparse_csr_tensor(offsets, columns, values, size=(shape.rows, shape.columns), check_invariants=True)
    stored = layers.size([offsets, columns, values])
    for count in tokens:
        x = layers.activations(count, shape, setting).to(dtype).T.contiguous()
        micros = twice([partial(torch.matmul, csr, x)], setting)
        yield cell(shape, "CSR alone", count, micros, stored, density=density)
