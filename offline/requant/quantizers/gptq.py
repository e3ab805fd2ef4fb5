"""GPTQ: columns are rounded one by one, and what is left of each error is spread over the columns to come.

Source: Frantar et al., arXiv 2210.17323, Algorithm 1 (blocked, Cholesky of the inverse). Excluded entries carry no
rounding error, as the outliers of SpQR (arXiv 2306.03078); they still move with the compensation, at no cost.
"""

import torch
from requant_kernels.rounding.dense import QuantizedDense
from requant_kernels.rounding.grid import Grid

BLOCK = 128


def quantize(
    weight: torch.Tensor,
    grid: Grid,
    second_moment: torch.Tensor,
    *,
    excluded: torch.Tensor | None = None,
    damping: float = 0.01,
    act_order: bool = True,
) -> tuple[QuantizedDense, torch.Tensor]:
    """weight fp32 [N, K], second_moment E[x x^T] fp32 [K, K] -> (dense part, target fp32 [N, K]).

    ``target`` is the compensated weight just before rounding: what dense plus sparse shall equal on ``excluded`` (bool
    [N, K]). The grid is fixed beforehand, so ``act_order`` (columns by falling E[x^2]) leaves the order of groups on
    disk alone. ``damping``: share of the mean diagonal added to the diagonal. Raises ValueError where the damped moment
    is not positive definite.
    """
    rows, columns = weight.shape
    device = weight.device
    order = second_moment.diagonal().argsort(descending=True) if act_order else torch.arange(columns, device=device)
    inverse = _inverse_factor(second_moment[order][:, order], damping)
    left = weight[:, order].clone()
    columns_of_grid = grid.columns(order, columns // grid.scheme.groups(columns))
    free = torch.zeros_like(weight, dtype=torch.bool) if excluded is None else excluded[:, order]
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=device)
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        errors = torch.zeros(rows, stop - start, device=device)
        for j in range(start, stop):
            column, one = left[:, j : j + 1], torch.tensor([j], device=device)
            at = columns_of_grid.columns(one, 1)
            codes[:, j : j + 1] = at.codes(column.masked_fill(free[:, j : j + 1], 0))
            rounding = (column - at.values(codes[:, j : j + 1])).masked_fill(free[:, j : j + 1], 0)
            error = rounding / inverse[j, j]
            left[:, j + 1 : stop] -= error * inverse[j, j + 1 : stop]
            errors[:, j - start : j - start + 1] = error
        left[:, stop:] -= errors @ inverse[start:stop, stop:]
    back = order.argsort()
    return grid.dense(codes[:, back].contiguous()), left[:, back]


def _inverse_factor(second_moment: torch.Tensor, damping: float) -> torch.Tensor:
    """Upper U with U^T U = (H + damping mean(diag H) I)^-1, in float64 for the sake of nearly singular moments."""
    damped = second_moment.double()
    diagonal = damped.diagonal()
    damped = damped + torch.eye(len(damped), device=damped.device) * (damping * diagonal.mean())
    # an input channel that is always zero puts no demand on its column
    dead = diagonal == 0
    damped[dead, dead] = damped.diagonal().max().clamp(min=1)
    factor, failed = torch.linalg.cholesky_ex(damped)
    if int(failed):
        raise ValueError(f"the second moment of the inputs is not positive definite at damping {damping:g}")
    return torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True).float()
