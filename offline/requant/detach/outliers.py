"""Outliers by magnitude at a uniform ratio: the baseline that self-adaptive ratios are measured against."""

import torch


def largest(weight: torch.Tensor, ratio: float) -> torch.Tensor:
    """bool [N, K] with exactly round(ratio * N * K) entries set: the largest |w|; among equals the first in row order.

    topk alone would break ties differently from device to device, and so from run to run.
    """
    magnitude = weight.abs().flatten()
    count = round(ratio * magnitude.numel())
    if count == 0:
        return torch.zeros_like(weight, dtype=torch.bool)
    threshold = torch.topk(magnitude, count, sorted=False).values.min()
    chosen = magnitude > threshold
    ties = (magnitude == threshold).nonzero().flatten()
    chosen[ties[: count - int(chosen.sum())]] = True
    return chosen.view_as(weight)
