"""Which entries are outliers, by magnitude: at a uniform ratio, by SqueezeLLM's rule, or at self-adaptive ratios.

Algorithm 1 of arXiv 2503.01901 is reconstructed; the paper's text is not public.
"""

from collections.abc import Callable, Mapping

import torch

from requant.sensitivity.selection import mask_of, top_k

EXPONENTS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0)
MOST = 0.05  # of one matrix: keeps a single layer from taking the whole budget

Weights = Mapping[str, torch.Tensor]
Masks = dict[str, torch.Tensor]


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


def beyond_quartiles(weights: Weights, ratio: float) -> Masks:
    """SqueezeLLM's rule (arXiv 2306.07629, section 4.2): entries outside [Q1 - c IQR, Q3 + c IQR] of their own matrix,
    with the one c that makes exactly round(ratio * all entries) of them. Masks bool [N, K] by name, on the CPU
    wherever the weights are."""
    total = sum(weight.numel() for weight in weights.values())

    def excess(weight: torch.Tensor) -> torch.Tensor:
        ordered = weight.float().flatten().sort().values
        low, high = ordered[len(ordered) // 4], ordered[3 * len(ordered) // 4]
        return torch.maximum(low - weight, weight - high) / (high - low).clamp(min=torch.finfo(torch.float32).tiny)

    chosen = top_k(
        lambda: ((name, excess(weight.float().cpu())) for name, weight in weights.items()), round(ratio * total)
    )
    return {name: mask_of(index, weights[name].shape) for name, index in chosen.items()}


def ratios(means: Mapping[str, float], sizes: Mapping[str, int], budget: float, exponent: float) -> dict[str, float]:
    """r_l = min(c m_l^exponent, MOST) with c such that sum_l r_l n_l = budget * sum_l n_l (water-filling).

    means: the mean sensitivity m_l >= 0 of each matrix; sizes: its entries n_l. Raises ValueError where ``budget``
    is more than MOST, which no ratios can spend.
    """
    if not 0 <= budget <= MOST:
        raise ValueError(f"an outlier budget of {budget:.2%} is outside 0 % to {MOST * 100:g} %")
    # relative to the largest, so that no power overflows; a matrix without any sensitivity keeps a trace of a share
    top = max(means.values()) or 1.0
    shares = {name: max(mean / top, 1e-12) ** exponent for name, mean in means.items()}
    left, full = budget * sum(sizes.values()), set[str]()
    while True:
        open_shares = sum(shares[name] * sizes[name] for name in shares if name not in full)
        c = left / open_shares if open_shares else 0.0
        over = {name for name in shares if name not in full and c * shares[name] > MOST}
        if not over:
            return {name: MOST if name in full else c * share for name, share in shares.items()}
        full |= over
        left -= sum(MOST * sizes[name] for name in over)


def adaptive(
    weights: Weights, means: Mapping[str, float], budget: float, loss_of: Callable[[Masks], float]
) -> tuple[Masks, dict[float, float]]:
    """Algorithm 1: the outliers of the exponent with the least loss, and the loss of each exponent tried.

    weights: fp32 [N, K] by name; means: the mean |PQI| of each, under a first quantization; loss_of(masks): the loss of
    the model re-quantized around these outliers, on samples that ``means`` have not seen. Exponent 0 is the uniform
    ratio, so that what is returned can not lose to it there. The first of equals is kept.
    """
    sizes = {name: weight.numel() for name, weight in weights.items()}
    best: Masks = {}
    losses: dict[float, float] = {}
    for exponent in EXPONENTS:
        share = ratios(means, sizes, budget, exponent)
        masks = {name: largest(weight, share[name]) for name, weight in weights.items()}
        loss = loss_of(masks)
        if loss < min(losses.values(), default=float("inf")):
            best = masks
        losses[exponent] = loss
    return best, losses
