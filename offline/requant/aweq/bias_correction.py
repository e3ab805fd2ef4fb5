"""What quantization adds to a layer's output on average is subtracted again, where that helps.

AWEQ: b' = b - (E[W_q x_q] - E[W x]), with running means over calibration batches whose inputs the already quantized
layers before produce (the weight-only form by a secondary summary; the form with x_q derived; the order of the batches
our reconstruction). Ours: each token weighs in the mean as in error.py, and a correction is kept only where it lowers
the error, so weighed, on batches that it was not computed from.

In a plain mean the first token of each sequence, whose massive activations are a hundred times larger than all other
hidden states, moves every other token: on SmolLM2 that made GPTQ worse (docs/AWEQ.md).
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Correction:
    """value fp32 [N] to add to the output; error_without and error_with: weighed squared output error on held-out
    batches, the latter with a value from the other batches."""

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


def correction(batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Correction:
    """batches: quantized output minus original output, [T, N], with the weight of each token, [T]; at least two.

    Every second batch is held out to decide; the value itself is the weighed mean over all of them, so that nothing of
    the mean error is left over the calibration set.
    """
    used, held_out = _Running(), _Running()
    for index, (differences, weights) in enumerate(batches):
        (held_out if index % 2 else used).add(differences.detach().double(), weights.double())
    estimate = torch.as_tensor(used.weighed) / used.weight
    # sum w |d - e|^2 = sum w |d|^2 - 2 e sum w d + |e|^2 sum w
    weighed = torch.as_tensor(held_out.weighed)
    change = float(held_out.weight * (estimate @ estimate) - 2 * estimate @ weighed)
    mean = (torch.as_tensor(used.weighed) + weighed) / (used.weight + held_out.weight)
    return Correction(-mean.float(), held_out.squares, held_out.squares + change)
