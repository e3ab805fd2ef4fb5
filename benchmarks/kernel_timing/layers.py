"""Random layers of any size, made on the device, and calls that rotate over copies larger than the L2 cache."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from requant_kernels import reference
from requant_kernels.dense_sparse.interface import LayerConfig
from requant_kernels.dense_sparse.triton.implementation import Triton
from requant_kernels.dense_sparse.triton.table import Decode, Table, Tile
from requant_kernels.packing import packed_length
from requant_kernels.prepared import Prepared, Runs
from requant_kernels.scheme import LayerScheme, SparseScheme, WeightScheme
from requant_kernels.sparse import SparsePart
from requant_kernels.weight import DenseSparseWeight

from benchmarks.kernel_timing.clock import Calls
from benchmarks.kernel_timing.shapes import Shape

PAST_L2 = 256 * 2**20  # bytes; the largest L2 so far has 126 MB
SIGMA = 1.2  # of the logarithm of a row's share of the entries
WORST_ERROR = {torch.bfloat16: 4e-3, torch.float16: 1e-3}  # norm of the difference over norm of the exact result


# Without a GPU every program of a kernel takes half a second: the largest tiles, so that there are few.
INTERPRETED = Table(
    (),
    "the interpreter",
    (
        Tile("one", up_to=1, tokens=1, strips=8, stages=2, programs=1, k_warps=2),
        Tile("middle", up_to=64, tokens=64, strips=8, stages=2, programs=1),
    ),
    Decode(strips=8, k_warps=1, stages=2, workspace_mib=1),
)


@dataclass(frozen=True)
class Setting:
    """``uneven``: entries crowd in some rows as they do in trained models (docs/ROOFLINE.md, "Real checkpoints")."""

    device: torch.device
    dtype: torch.dtype
    uneven: bool = False

    @property
    def implementation(self) -> Triton:
        return Triton(None if self.device.type == "cuda" else INTERPRETED)

    @property
    def copies_of(self) -> int:
        """Bytes that the copies of a layer must exceed together."""
        return PAST_L2 if self.device.type == "cuda" else 0


def random_weight(shape: Shape, bits: int, group: int, density: float, setting: Setting) -> DenseSparseWeight:
    """Uniform codes, steps around 0.01, normal residuals at random places, in rows of log-normal density if uneven."""
    rows, columns, device = shape.rows, shape.columns, setting.device
    generator = torch.Generator(device).manual_seed(0)
    words = (rows, packed_length(columns, bits))
    packed = torch.randint(-(2**31), 2**31, words, dtype=torch.int32, device=device, generator=generator)
    scale = torch.rand(rows, columns // group, device=device, generator=generator) * 0.01 + 0.005
    sparse = None
    if density:
        chosen = torch.rand(rows, columns, device=device, generator=generator)
        if setting.uneven:
            chosen /= torch.exp(SIGMA * torch.randn(rows, 1, device=device, generator=generator) - SIGMA**2 / 2)
        chosen = chosen < density
        values = torch.randn(rows, columns, device=device, generator=generator)
        sparse = SparsePart.from_mask((values * 0.1).to(setting.dtype), chosen)
    scheme = LayerScheme(WeightScheme(bits, group), SparseScheme() if sparse else None)
    return DenseSparseWeight(scheme, columns, group, packed, scale.to(setting.dtype), sparse=sparse)


def activations(tokens: int, shape: Shape, setting: Setting) -> torch.Tensor:
    generator = torch.Generator(setting.device).manual_seed(tokens)
    return torch.randn(tokens, shape.columns, device=setting.device, generator=generator).to(setting.dtype)


def prepare(implementation: Triton, weight: DenseSparseWeight, setting: Setting) -> Prepared:
    return implementation.prepare(weight, LayerConfig.of(weight, setting.dtype, setting.device))


def size(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def rotations(stored: int, setting: Setting) -> int:
    """How many copies of so many bytes do not fit into the L2 cache together, even without one of them."""
    return setting.copies_of // stored + 2


def rotated(tensors: list[torch.Tensor], setting: Setting) -> list[list[torch.Tensor]]:
    """Copies that do not fit into the L2 cache together."""
    count = rotations(size(tensors), setting)
    return [tensors, *([tensor.clone() for tensor in tensors] for _ in range(count - 1))]


def calls(implementation: Runs, prepared: Prepared, copies: list[list[torch.Tensor]], x: torch.Tensor) -> Calls:
    """One call for each copy of the layer."""
    rest = (None, prepared.out_features, list(prepared.meta))
    return [partial(implementation.apply, x, tensors, *rest) for tensors in copies]


def run_once(implementation: Runs, prepared: Prepared, shape: Shape, tokens: Sequence[int], setting: Setting) -> None:
    """One call at each number of tokens: everything that these launch is compiled then."""
    for count in tokens:
        calls(implementation, prepared, [list(prepared.tensors.values())], activations(count, shape, setting))[0]()


def check(y: torch.Tensor, x: torch.Tensor, exact: torch.Tensor) -> float:
    """The relative error of y against fp32 x W^T; raises ArithmeticError where it is no rounding error."""
    return relative_error(y, x.float() @ exact.T)


def relative_error(y: torch.Tensor, expected: torch.Tensor) -> float:
    """Raises ArithmeticError where y differs from the fp32 ``expected`` by more than rounding to its dtype."""
    error = float((y.float() - expected).norm() / expected.norm())
    if not error < WORST_ERROR[y.dtype]:  # NaN never passes
        raise ArithmeticError(f"relative error {error:.1e} of an output {tuple(y.shape)}")
    return error


def exact_weight(weight: DenseSparseWeight) -> torch.Tensor:
    return reference.dequantize(weight)
