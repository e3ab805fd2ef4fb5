"""From a path and a criterion to scores that can be walked again and again, one matrix at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from requant.sensitivity.criteria import Criterion, Evidence, criterion
from requant.sensitivity.pqi import Completeness, Path, PathGradients, completeness
from requant.sensitivity.quadrature import Rule
from requant.sensitivity.store import TensorStore
from requant.settings import Selection


@dataclass(frozen=True)
class Measurement:
    """Scores of all entries, recomputed from gradient moments on demand, so that only those are held."""

    path: Path
    criterion: Criterion
    gradients: PathGradients
    tokens: int
    seed: int

    def score(self, name: str) -> torch.Tensor:
        """fp32 [N, K] of one matrix, for the error that the path's end has there now."""
        weight = self.path.start[name].float()
        evidence = Evidence(
            weight,
            self.path.end[name].float() - weight,
            self.gradients.mean.get(name),
            self.gradients.square.get(name),
            self.tokens,
            torch.Generator().manual_seed(self.seed * len(self.path.parameters) + self._position(name)),
        )
        return self.criterion.score(evidence)

    def _position(self, name: str) -> int:
        return list(self.path.parameters).index(name)

    def scores(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, fp32 [N, K]) of every matrix, always the same and in the same order."""
        for name in self.path.parameters:
            yield name, self.score(name)

    def completeness(self, samples: Sequence[torch.Tensor]) -> Completeness:
        """Of the path integral behind the scores, against the loss of ``samples`` at both ends."""
        return completeness(self.path, self.gradients, samples)

    def means(self) -> dict[str, float]:
        """The mean score of each matrix: the statistic of the PQI paper's Table 4, which Algorithm 1 uses."""
        return {name: float(scores.double().mean()) for name, scores in self.scores()}


@dataclass(frozen=True)
class Sensitivity:
    """How to measure: the criterion, the quadrature of criteria that integrate, the seed of the random control."""

    criterion: Criterion
    rule: Rule = "midpoint"
    intervals: int = 8
    seed: int = 0

    @classmethod
    def of(cls, selection: Selection, name: str | None = None, *, seed: int = 0) -> "Sensitivity":
        """As ``selection`` says, with its own criterion or the one of that name."""
        chosen = criterion(name or selection.sensitivity)
        return cls(chosen, rule=selection.quadrature, intervals=selection.intervals, seed=seed)

    def measure(self, path: Path, samples: Sequence[torch.Tensor]) -> Measurement:
        """samples: token ids int64 [B, T] of one shape. Raises ValueError where a loss is not finite."""
        points = self.criterion.points(self.rule, self.intervals)
        gradients = (
            path.gradients(samples, points, second_moment=self.criterion.second_moment)
            if points
            else PathGradients(TensorStore(), TensorStore())
        )
        return Measurement(path, self.criterion, gradients, samples[0].numel(), self.seed)
