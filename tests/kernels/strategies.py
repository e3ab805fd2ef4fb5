"""Random quantized layers for property tests."""

import torch
from hypothesis import strategies as st
from requant_kernels.scheme import LayerScheme, SparseScheme, WeightScheme
from requant_kernels.sparse import SparsePart
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
        WeightScheme(bits, group_size, symmetric, codebook), draw(st.sampled_from((None, SparseScheme())))
    )
    return random_weight(
        scheme,
        (draw(st.integers(1, 40)), columns),
        density=draw(st.sampled_from((0.0, 0.01, 0.5, 1.0))),
        dtype=draw(st.sampled_from((torch.bfloat16, torch.float16, torch.float32))),
        seed=draw(st.integers(0, 1000)),
    )
