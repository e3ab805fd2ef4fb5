"""Weighted k-means, one codebook of 2**bits levels per row (SqueezeLLM, arXiv 2306.07629).

All rows at once: each is sorted once, after which cluster sums are differences of prefix sums.
"""

import torch
from requant_kernels.rounding.dense import QuantizedDense
from requant_kernels.rounding.grid import Grid
from requant_kernels.scheme import WeightScheme

ITERATIONS = 50
STARTS = (0.0, 1 / 3, 2 / 3)  # 1/3 is how the levels of an optimal fine quantizer are spaced


def quantize(
    weight: torch.Tensor,
    scheme: WeightScheme,
    *,
    dtype: torch.dtype,
    importance: torch.Tensor | None = None,
    excluded: torch.Tensor | None = None,
    iterations: int = ITERATIONS,
) -> QuantizedDense:
    """weight fp32 [N, K] -> levels in ``dtype`` [N, 2**b] and the code of the nearest one.

    importance fp32 [N, K] (the Fisher diagonal) or [K], default 1; entries under ``excluded`` (bool [N, K]) weigh
    nothing and get the level nearest zero. A row of which nothing is left to weigh is weighed evenly.
    """
    weights = torch.ones_like(weight) if importance is None else importance.expand_as(weight)
    if excluded is not None:
        weights = weights.masked_fill(excluded, 0)
    weights = torch.where(weights.sum(1, keepdim=True) > 0, weights, torch.ones_like(weights))
    grid = Grid(scheme, codebook=_levels(weight, weights, scheme.levels, iterations).to(dtype))
    return grid.dense(grid.codes(weight if excluded is None else weight.masked_fill(excluded, 0)))


def _levels(weight: torch.Tensor, weights: torch.Tensor, count: int, iterations: int) -> torch.Tensor:
    """The best of Lloyd's algorithm from each of STARTS, row by row, fp32 [N, count] ascending."""
    values, order = weight.double().sort(1)
    mass = weights.double().gather(1, order)
    best, most = values[:, :count], torch.full_like(values[:, 0], -1)
    for power in STARTS:
        levels, explained = _lloyd(values, mass, _spaced(values, mass, count, power), iterations)
        best = torch.where((explained > most)[:, None], levels, best)
        most = torch.maximum(explained, most)
    return best.float()


def _lloyd(
    values: torch.Tensor, mass: torch.Tensor, levels: torch.Tensor, iterations: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of ``values`` ascending -> (levels [N, L], sum of mass * level^2 [N], which grows as the error falls)."""
    prefix_mass, prefix_sum = _prefix(mass), _prefix(mass * values)
    for _ in range(iterations):
        bounds = torch.searchsorted(values, (levels[:, 1:] + levels[:, :-1]) / 2)
        edges = torch.nn.functional.pad(bounds, (1, 0))
        edges = torch.nn.functional.pad(edges, (0, 1), value=values.shape[1])
        inside, total = (prefix.gather(1, edges).diff(dim=1) for prefix in (prefix_mass, prefix_sum))
        # an empty cluster stays where it is
        moved = torch.where(inside > 0, total / inside, levels).sort(1).values
        explained = torch.where(inside > 0, total.square() / inside, 0).sum(1)
        if torch.equal(moved, levels):
            break
        levels = moved
    return levels, explained


def _spaced(values: torch.Tensor, mass: torch.Tensor, count: int, power: float) -> torch.Tensor:
    """Levels at the centres of ``count`` equal shares of density^power along each sorted row [N, K]."""
    gaps = torch.nn.functional.pad(values.diff(dim=1), (0, 1))
    measure = _prefix(mass.pow(power) * gaps.pow(1 - power))[:, 1:].contiguous()
    shares = (torch.arange(count, dtype=values.dtype, device=values.device) + 0.5) / count * measure[:, -1:]
    index = torch.searchsorted(measure, shares).clamp(max=values.shape[1] - 1)
    return values.gather(1, index)


def _prefix(values: torch.Tensor) -> torch.Tensor:
    """[N, K] -> [N, K+1], sums of the first k."""
    return torch.nn.functional.pad(values.cumsum(1), (1, 0))
