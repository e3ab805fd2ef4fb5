"""Chooses how far each pair of a block is equalized: by formula, or by the least error of the block's output."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from requant_kernels.scheme import LayerScheme
from torch import nn

from requant.aweq.equalization import scales
from requant.aweq.observe import input_ranges
from requant.aweq.rewrite import Rewriter
from requant.aweq.settings import SEARCH, Equalization, RangeMethod
from requant.aweq.trial import Trial, input_rounding, restored
from requant.models import Pair

ALPHAS = tuple(step / 10 for step in range(2, 11))  # below, weights lose more than activations gain


@dataclass(frozen=True)
class Equalizer:
    """schemes: of a block's quantized layers, by local name; range_method: how their static steps will be found."""

    rewriter: Rewriter
    settings: Equalization
    schemes: Mapping[str, LayerScheme]
    range_method: RangeMethod

    @property
    def pairs(self) -> list[Pair]:
        """Those whose linear layers are all quantized: one that is left as it was stays so."""
        return [
            pair
            for pair in self.rewriter.pairs
            if self.schemes.keys() >= {*pair.consumers, *(() if pair.through == "norm" else (pair.producer,))}
        ]

    @torch.no_grad()
    def equalize(
        self, block: nn.Module, hidden: Sequence[torch.Tensor], keywords: dict[str, Any]
    ) -> tuple[dict[str, float | None], list[torch.Tensor]]:
        """Rewrites ``block`` (fp32) in place; hidden: what enters it in the unquantized model, [B, T, C] per sample.

        Returns the alpha of each pair by its producer's name, None where equalizing it would not help, and what leaves
        the block, before as after.
        """
        ranges, outputs = input_ranges(block, [pair.consumers[0] for pair in self.pairs], hidden, keywords)
        trial = Trial.of(block, hidden, outputs, keywords)
        kind = self.settings.range
        assert kind != "none"
        chosen: dict[str, float | None] = {}
        for pair in self.pairs:
            x = self.rewriter.input_range(block, pair, ranges[pair.consumers[0]], kind)
            w = self.rewriter.weight_range(block, pair, kind)
            if self.settings.alpha == SEARCH:
                alpha = self._best(trial, pair, {alpha: scales(x, w, alpha) for alpha in ALPHAS})
            else:
                alpha = float(self.settings.alpha)
            chosen[pair.producer] = alpha
            if alpha is not None:
                self.rewriter.apply(block, pair, scales(x, w, alpha))
        return chosen, outputs

    def _best(self, trial: Trial, pair: Pair, candidates: Mapping[float, torch.Tensor]) -> float | None:
        """The pair's linear layers are rounded, weights and inputs, all others are not."""
        schemes = {name: self.schemes[name] for name in (pair.producer, *pair.consumers) if name in self.schemes}
        weights = {name: scheme.weights for name, scheme in schemes.items()}
        inputs = {
            name: input_rounding(scheme, self.range_method) for name, scheme in schemes.items() if scheme.activations
        }
        errors: dict[float | None, float] = {None: trial.error(weights, inputs)}
        for alpha, scale in candidates.items():
            with restored(trial.block, (pair.producer, *pair.consumers)):
                self.rewriter.apply(trial.block, pair, scale)
                errors[alpha] = trial.error(weights, inputs)
        return min(errors, key=lambda alpha: errors[alpha])
