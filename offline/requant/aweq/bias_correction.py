"""What quantization adds to a layer's output on average is subtracted again, where that helps.

AWEQ: b' = b - (E[W_q x_q] - E[W x]), with running means over calibration batches whose inputs the already quantized
layers before produce (the weight-only form by a secondary summary; the form with x_q derived; the order of the batches
our reconstruction). Ours: each token weighs in the mean as in error.py, and a correction is kept only where it lowers
the error, so weighed, on batches that it was not computed from.

In a plain mean the first token of each sequence, whose massive activations are a hundred times larger than all other
hidden states, moves every other token.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

EVERY = 4  # one batch of so many is held out
Differences = Iterable[tuple[torch.Tensor, torch.Tensor]]
Item = TypeVar("Item")


def held_out(batches: Sequence[Item]) -> Sequence[Item]:
    """Those that decide: the second and every fourth after it."""
    return batches[1::EVERY]


def computed_from(batches: Sequence[Item]) -> list[Item]:
    """All others."""
    return [one for index, one in enumerate(batches) if index % EVERY != 1]


@dataclass(frozen=True)
class Correction:
    """value fp32 [N] to add to the output; error_without and error_with it: weighed squared output error on batches
    that it was not computed from."""

    value: torch.Tensor
    error_without: float
    error_with: float

    @property
    def helps(self) -> bool:
        return self.error_with < self.error_without


@dataclass
class _Running:
    """Sums in float64 of the weights of tokens, of their weighed differences [N], and of the squares of these."""

    weight: float = 0.0
    weighed: torch.Tensor | float = 0.0
    squares: float = 0.0

    def add(self, differences: torch.Tensor, weights: torch.Tensor) -> None:
        self.weight += float(weights.sum())
        self.weighed = weights @ differences + self.weighed
        self.squares += float(weights @ differences.square().sum(1))


def correction(used: Differences, deciding: Differences) -> Correction:
    """Of each batch: quantized output minus original output, [T, N], with the weight of each token, [T].

    The value is the weighed mean over the batches ``used``, so that nothing of the mean error is left over them;
    ``deciding`` are others.
    """
    found, held = _Running(), _Running()
    for running, batches in ((found, used), (held, deciding)):
        for differences, weights in batches:
            running.add(differences.detach().double(), weights.double())
    mean = torch.as_tensor(found.weighed) / found.weight
    # sum w |d - m|^2 = sum w |d|^2 - 2 m sum w d + |m|^2 sum w
    change = float(held.weight * (mean @ mean) - 2 * mean @ torch.as_tensor(held.weighed))
    return Correction(-mean.float(), held.squares, held.squares + change)
