"""Algorithm 2 of arXiv 2503.01901: significant weights, step by step (reconstructed; its text is not public).

Entries are given back their original value in steps; after each, the sensitivity of what is still quantized is measured
anew, because the path it is integrated along has changed.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from requant.sensitivity.measure import Measurement, Sensitivity
from requant.sensitivity.pqi import Completeness, Path
from requant.sensitivity.selection import top_k

Indices = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Significant:
    """indices: flat, int64, ascending, by name. completeness: of each step's integral; empty where the criterion takes
    none along the path."""

    indices: Indices
    completeness: list[Completeness]


def select(
    path: Path,
    samples: Sequence[torch.Tensor],
    sensitivity: Sensitivity,
    count: int,
    *,
    steps: int = 2,
    per_matrix: bool = False,
    taken: Mapping[str, torch.Tensor] | None = None,
) -> Significant:
    """The ``count`` most sensitive entries of all matrices outside ``taken`` (flat indices), in ``steps`` equal parts.

    ``path`` runs from the original to the quantized weights. Chosen entries get their original value at its end, in
    place. ``per_matrix``: the same share of each matrix instead of one global ranking. Raises ValueError where there
    are fewer than ``count`` entries, or a loss is not finite.
    """
    nothing = torch.empty(0, dtype=torch.int64)
    chosen = dict.fromkeys(path.parameters, nothing)
    closed = {name: nothing if taken is None else taken[name] for name in path.parameters}
    integrals = []
    for step in range(steps):
        part = count * (step + 1) // steps - count * step // steps
        measurement = sensitivity.measure(path, samples)
        if sensitivity.criterion.rule == "path":
            integrals.append(measurement.completeness(samples))
        for name, index in _best(measurement, part, closed, per_matrix).items():
            chosen[name] = torch.cat([chosen[name], index]).sort().values
            closed[name] = torch.cat([closed[name], index])
            path.end[name].view(-1)[index] = path.start[name].flatten()[index].to(path.end[name].dtype)
    return Significant(chosen, integrals)


def _best(measurement: Measurement, count: int, closed: Indices, per_matrix: bool) -> Indices:
    def open_scores() -> Iterator[tuple[str, torch.Tensor]]:
        for name, scores in measurement.scores():
            flat = scores.flatten()
            flat[closed[name]] = -float("inf")
            yield name, flat

    if not per_matrix:
        return top_k(open_scores, count)
    total = sum(parameter.numel() for parameter in measurement.path.parameters.values())
    best: Indices = {}
    for name, scores in open_scores():
        best |= top_k([(name, scores)].copy, round(count * scores.numel() / total))
    return best
