"""What quantization adds to a layer's output on average is subtracted again, where that helps.

AWEQ: b' = b - (E[W_q x_q] - E[W x]), with running means over calibration batches whose inputs the already quantized
layers before produce (the weight-only form by a secondary summary; the form with x_q derived; the order of the batches
our reconstruction). That a correction is kept only where it lowers the error on batches that it was not computed from,
each token weighed as in error.py, is ours.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

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
    """Sums of the differences of tokens [N] in float64; and of weights, and weighed differences, and their squares."""

    total: torch.Tensor | float = 0.0
    count: int = 0
    weight: float = 0.0
    weighed: torch.Tensor | float = 0.0
    squares: float = field(default=0.0)

    def add(self, differences: torch.Tensor, weights: torch.Tensor) -> None:
        self.total = differences.sum(0) + self.total
        self.count += len(differences)
        self.weight += float(weights.sum())
        self.weighed = weights @ differences + self.weighed
        self.squares += float(weights @ differences.square().sum(1))


def correction(batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Correction:
    """batches: quantized output minus original output, [T, N], with the weight of each token, [T]; at least two.

    Every second batch is held out to decide; the value itself is the mean over all of them, so that nothing of the
    mean error is left over the calibration set.
    """
    used, held_out = _Running(), _Running()
    for index, (differences, weights) in enumerate(batches):
        (held_out if index % 2 else used).add(differences.detach().double(), weights.double())
    estimate = torch.as_tensor(used.total) / used.count
    # sum w |d - e|^2 = sum w |d|^2 - 2 e sum w d + |e|^2 sum w
    weighed = torch.as_tensor(held_out.weighed)
    change = float(held_out.weight * (estimate @ estimate) - 2 * estimate @ weighed)
    mean = (torch.as_tensor(used.total) + torch.as_tensor(held_out.total)) / (used.count + held_out.count)
    return Correction(-mean.float(), held_out.squares, held_out.squares + change)
