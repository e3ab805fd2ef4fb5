"""Algorithm 2 of arXiv 2503.01901: significant weights, step by step (reconstructed; its text is not public).

Entries are given back their original value in steps; after each, the sensitivity of what is still quantized is measured
anew, because the path it is integrated along has changed.
"""

from collections.abc import Iterator, Sequence

import torch

from requant.sensitivity.measure import Measurement, Sensitivity
from requant.sensitivity.pqi import Path
from requant.sensitivity.selection import top_k

Chosen = dict[str, torch.Tensor]


def select(
    path: Path,
    samples: Sequence[torch.Tensor],
    sensitivity: Sensitivity,
    count: int,
    *,
    steps: int = 2,
    per_matrix: bool = False,
) -> Chosen:
    """Flat indices (int64, ascending) of ``count`` entries over all matrices, by name, taken in ``steps`` equal parts.

    ``path`` runs from the original to the quantized weights. Chosen entries get their original value at its end, in
    place. ``per_matrix``: the same share of each matrix instead of one global ranking. Raises ValueError where there
    are fewer than ``count`` entries, or a loss is not finite.
    """
    chosen = {name: torch.empty(0, dtype=torch.int64) for name in path.parameters}
    for step in range(steps):
        part = count * (step + 1) // steps - count * step // steps
        best = _best(sensitivity.measure(path, samples), part, chosen, per_matrix)
        for name, index in best.items():
            chosen[name] = torch.cat([chosen[name], index]).sort().values
            path.end[name].view(-1)[index] = path.start[name].flatten()[index].to(path.end[name].dtype)
    return chosen


def masks(chosen: Chosen, path: Path) -> dict[str, torch.Tensor]:
    """bool [N, K] by name, True at the flat indices ``chosen``."""
    found = {name: torch.zeros(parameter.shape, dtype=torch.bool) for name, parameter in path.parameters.items()}
    for name, index in chosen.items():
        found[name].view(-1)[index] = True
    return found


def _best(measurement: Measurement, count: int, taken: Chosen, per_matrix: bool) -> Chosen:
    def open_scores() -> Iterator[tuple[str, torch.Tensor]]:
        for name, scores in measurement.scores():
            flat = scores.flatten()
            flat[taken[name]] = -float("inf")
            yield name, flat

    if not per_matrix:
        return top_k(open_scores, count)
    total = sum(parameter.numel() for parameter in measurement.path.parameters.values())
    best: Chosen = {}
    for name, scores in open_scores():
        best |= top_k([(name, scores)].copy, round(count * scores.numel() / total))
    return best
