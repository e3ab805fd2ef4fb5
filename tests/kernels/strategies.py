"""Random quantized layers for property tests."""

import torch
from hypothesis import strategies as st
from requant_kernels.scheme import ActivationScheme, LayerScheme, SparseScheme, WeightScheme
from requant_kernels.sparse import SparsePart
from requant_kernels.w8a8.weight import W8A8Weight
from requant_kernels.weight import DenseSparseWeight


def random_weight(
    scheme: LayerScheme,
    shape: tuple[int, int],
    *,
    density: float = 0.02,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> DenseSparseWeight:
    """A layer with random codes, scales and residuals; every fifth row of the sparse part is empty."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape
    weights = scheme.weights
    groups = weights.groups(columns)

    def uniform(*size: int) -> torch.Tensor:
        return torch.rand(*size, generator=generator)

    def integers(*size: int) -> torch.Tensor:
        return torch.randint(0, weights.levels, size, generator=generator)

    sparse = None
    if scheme.sparse:
        mask = uniform(rows, columns) < density
        mask[::5] = False
        sparse = SparsePart.from_mask(torch.randn(rows, columns, generator=generator).to(dtype), mask)
    return DenseSparseWeight.from_codes(
        scheme,
        integers(rows, columns),
        scale=None if weights.codebook else (uniform(rows, groups) * 0.1 + 0.01).to(dtype),
        zero_points=None if weights.symmetric else integers(rows, groups),
        codebook=torch.randn(rows, weights.levels, generator=generator).to(dtype) if weights.codebook else None,
        sparse=sparse,
        bias_correction=torch.randn(rows, generator=generator).to(dtype) if scheme.bias_correction else None,
    )


def random_w8a8(
    activations: ActivationScheme,
    shape: tuple[int, int],
    *,
    bias_correction: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> W8A8Weight:
    """A W8A8 layer with codes over all of int8; its static range clips inputs of N(0, 1) now and then."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape
    scheme = LayerScheme(WeightScheme(8), None, activations, bias_correction)
    static, asymmetric = not activations.dynamic, not activations.symmetric
    return W8A8Weight(
        scheme,
        torch.randint(-128, 128, (rows, columns), generator=generator, dtype=torch.int8),
        (torch.rand(rows, generator=generator) * 0.1 + 0.01).to(dtype),
        torch.tensor([0.02]).to(dtype) if static else None,
        torch.randint(-128, 128, (1,), generator=generator, dtype=torch.int8) if static and asymmetric else None,
        torch.randn(rows, generator=generator).to(dtype) if bias_correction else None,
    )


@st.composite
def layers(draw: st.DrawFn) -> DenseSparseWeight:
    """Layers of every scheme, 1..40 rows, 32..256 columns."""
    codebook = draw(st.booleans())
    bits = draw(st.sampled_from((2, 3, 4) if codebook else (2, 3, 4, 8)))
    group_size = -1 if codebook else draw(st.sampled_from((-1, 32, 64, 128)))
    columns = (32 if group_size == -1 else group_size) * draw(st.integers(1, 2))
    symmetric = codebook or draw(st.booleans())
    scheme = LayerScheme(
        WeightScheme(bits, group_size, symmetric, codebook),
        draw(st.sampled_from((None, SparseScheme()))),
        bias_correction=draw(st.booleans()),
    )
    return random_weight(
        scheme,
        (draw(st.integers(1, 40)), columns),
        density=draw(st.sampled_from((0.0, 0.01, 0.5, 1.0))),
        dtype=draw(st.sampled_from((torch.bfloat16, torch.float16, torch.float32))),
        seed=draw(st.integers(0, 1000)),
    )


@st.composite
def w8a8_layers(draw: st.DrawFn) -> W8A8Weight:
    """W8A8 layers of every scheme, 1..40 rows, 1..100 columns."""
    return random_w8a8(
        ActivationScheme(dynamic=draw(st.booleans()), symmetric=draw(st.booleans())),
        (draw(st.integers(1, 40)), draw(st.integers(1, 100))),
        bias_correction=draw(st.booleans()),
        dtype=draw(st.sampled_from((torch.bfloat16, torch.float16, torch.float32))),
        seed=draw(st.integers(0, 1000)),
    )
