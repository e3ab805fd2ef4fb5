"""Which entries of a whole model go to the sparse part, before anything is quantized for good.

The order is ours: a base whose errors compensate each other is only disturbed by entries that are restored afterwards.
So they are chosen first, under a simple rounding on searched ranges, and the base then quantizes around them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from requant.detach import outliers, significant
from requant.sensitivity.measure import Sensitivity
from requant.sensitivity.pqi import Completeness, Path
from requant.sensitivity.selection import mask_of
from requant.settings import OutlierRule, Selection

HELD_OUT = 4  # one in so many samples judges the exponents of Algorithm 1

Rounder = Callable[[str, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Budget:
    """Shares of all entries that the sparse part may hold."""

    outliers: float
    significant: float


def choose(
    path: Path,
    samples: Sequence[torch.Tensor],
    budget: Budget,
    selection: Selection,
    rounded: Rounder,
    *,
    seed: int = 0,
) -> tuple[dict[str, torch.Tensor], list[Completeness]]:
    """Masks bool [N, K] by name, and the completeness of each path integral that significant weights took.

    rounded(name, weight, mask): ``weight`` quantized, as it was under ``mask``; ``path.end`` holds it for empty masks
    and is moved on. Leaves the model at the path's start.
    """
    masks = {name: torch.zeros(weight.shape, dtype=torch.bool) for name, weight in path.start.items()}
    integrals: list[Completeness] = []
    if budget.outliers:
        masks = _outliers(path, samples, budget.outliers, selection, rounded)
    if budget.significant:
        if budget.outliers:
            _requantize(path, masks, rounded)
        found = significant.select(
            path,
            samples,
            Sensitivity.of(selection, seed=seed),
            round(budget.significant * sum(mask.numel() for mask in masks.values())),
            steps=selection.steps,
            per_matrix=selection.per_matrix,
            taken={name: mask.flatten().nonzero().flatten() for name, mask in masks.items()},
        )
        integrals = found.completeness
        for name, index in found.indices.items():
            masks[name] |= mask_of(index, masks[name].shape)
    path.move_to(0.0)
    return masks, integrals


def by_weights(weights: outliers.Weights, ratio: float, rule: OutlierRule) -> dict[str, torch.Tensor]:
    """By any rule but 'adaptive', which is the only one that a rounding decides; weights: fp32 [N, K] by name, on any
    device. Masks bool [N, K] on the CPU, where weights come one by one."""
    if rule == "quartiles":
        return outliers.beyond_quartiles(weights, ratio)
    return {name: outliers.largest(weight.cpu(), ratio) for name, weight in weights.items()}


def _outliers(
    path: Path, samples: Sequence[torch.Tensor], ratio: float, selection: Selection, rounded: Rounder
) -> dict[str, torch.Tensor]:
    if selection.rule != "adaptive":
        return by_weights(path.start, ratio, selection.rule)
    held, seen = samples[::HELD_OUT], [sample for i, sample in enumerate(samples) if i % HELD_OUT]
    means = Sensitivity.of(selection, "pqi").measure(path, seen).means()

    def loss_of(masks: Mapping[str, torch.Tensor]) -> float:
        _requantize(path, masks, rounded)
        return path.loss_at(1.0, held)

    return outliers.adaptive(path.start, means, ratio, loss_of)[0]


def _requantize(path: Path, masks: Mapping[str, torch.Tensor], rounded: Rounder) -> None:
    for name, weight in path.start.items():
        path.end[name].copy_(rounded(name, weight, masks[name]))
