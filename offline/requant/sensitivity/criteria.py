"""Scores that rank weights for the sparse part, by their true names: one interface over gradients and differences.

Every score is a pure function of one matrix: w the original, d = w~ - w the error of quantization, G and Q the first
and second moment over samples of the gradient integrated over the criterion's own nodes. The larger the score, the
more the entry is worth keeping.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from requant.sensitivity.quadrature import Rule, nodes


@dataclass(frozen=True)
class Evidence:
    """One matrix: fp32 [N, K] each; ``mean`` and ``square`` are None where the criterion needs no gradient.

    tokens: predicted tokens per sample, which turns squared sample-mean gradients into a curvature.
    """

    weight: torch.Tensor
    error: torch.Tensor
    mean: torch.Tensor | None
    square: torch.Tensor | None
    tokens: int
    generator: torch.Generator


Score = Callable[[Evidence], torch.Tensor]


@dataclass(frozen=True)
class Criterion:
    """A named score and the gradients that it needs: the rule None needs none, "path" is the run's quadrature."""

    name: str
    source: str
    score: Score
    rule: Rule | Literal["path"] | None = "path"
    second_moment: bool = False

    def points(self, rule: Rule, intervals: int) -> list[tuple[float, float]]:
        """The nodes to integrate over, given the run's quadrature; empty where no gradient is needed."""
        if self.rule is None:
            return []
        return nodes(rule, intervals) if self.rule == "path" else nodes(self.rule, 1)


def _mean(e: Evidence) -> torch.Tensor:
    assert e.mean is not None
    return e.mean


def _square(e: Evidence) -> torch.Tensor:
    assert e.square is not None
    return e.square


def _marginal(e: Evidence) -> torch.Tensor:
    # Setting entry i back moves it by -d_i, so the loss falls by g_i(w~) d_i - 1/2 H_ii d_i^2. The Fisher estimate of
    # H_ii is the mean of squared *token* gradients, `tokens` times that of sample means.
    return _mean(e) * e.error - 0.5 * e.tokens * _square(e) * e.error.square()


def _random(e: Evidence) -> torch.Tensor:
    return torch.rand(e.weight.shape, generator=e.generator)


CRITERIA = {
    criterion.name: criterion
    for criterion in (
        Criterion("pqi", "arXiv 2503.01901: |d_i E_s[INT g_s,i]|", lambda e: (_mean(e) * e.error).abs()),
        Criterion("pqi-signed", "d_i E_s[INT g_s,i]: only errors that raise the loss", lambda e: _mean(e) * e.error),
        Criterion(
            "pqi-second-moment",
            "ours: E_s[(d_i INT g_s,i)^2]",
            lambda e: _square(e) * e.error.square(),
            second_moment=True,
        ),
        Criterion("fisher", "SqueezeLLM, arXiv 2306.07629: E_s[g_s,i(w)^2]", _square, "start", True),
        Criterion(
            "fisher-error",
            "E_s[g_s,i(w)^2] d_i^2: twice the diagonal second-order term",
            lambda e: _square(e) * e.error.square(),
            "start",
            True,
        ),
        Criterion("first-order", "|d_i g_i(w)|", lambda e: (_mean(e) * e.error).abs(), "start"),
        Criterion("end-point", "|d_i g_i(w~)|", lambda e: (_mean(e) * e.error).abs(), "end"),
        Criterion(
            "marginal", "g_i(w~) d_i - 1/2 H_ii d_i^2: the loss that restoring i removes", _marginal, "end", True
        ),
        Criterion("magnitude", "|w_i|", lambda e: e.weight.abs(), None),
        Criterion("error", "|d_i|", lambda e: e.error.abs(), None),
        Criterion("random", "uniform", _random, None),
    )
}


def criterion(name: str) -> Criterion:
    """Raises ValueError with the known names."""
    if name not in CRITERIA:
        raise ValueError(f"sensitivity {name!r} is not one of {', '.join(CRITERIA)}")
    return CRITERIA[name]
