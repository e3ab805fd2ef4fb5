"""Chooses how far each pair of a block is equalized: by formula, or by the least error of the block's output."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from requant_kernels.scheme import ActivationScheme, LayerScheme
from torch import nn

from requant.architecture import Pair
from requant.aweq.equalization import ChannelRange, scales
from requant.aweq.installed import RoundInput
from requant.aweq.observe import input_ranges
from requant.aweq.rewrite import Rewriter
from requant.aweq.settings import SEARCH, Equalization
from requant.aweq.static_range import of_bounds
from requant.aweq.trial import Trial, restored

ALPHAS = tuple(step / 10 for step in range(2, 11))  # below, weights lose more than activations gain


@dataclass(frozen=True)
class Equalizer:
    """schemes: of a block's quantized layers, by local name."""

    rewriter: Rewriter
    settings: Equalization
    schemes: Mapping[str, LayerScheme]

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
        ranges, outputs = input_ranges(block, list(self.schemes), hidden, keywords)
        trial = Trial.of(block, hidden, outputs, keywords)
        kind = self.settings.range
        assert kind != "none"
        chosen: dict[str, float | None] = {}
        for pair in self.pairs:
            x = self.rewriter.input_range(block, pair, ranges[pair.consumers[0]], kind)
            w = self.rewriter.weight_range(block, pair, kind)
            if self.settings.alpha == SEARCH:
                alpha = self._best(trial, pair, ranges, {alpha: scales(x, w, alpha) for alpha in ALPHAS})
            else:
                alpha = float(self.settings.alpha)
            chosen[pair.producer] = alpha
            if alpha is not None:
                ranges |= self._divided(block, pair, ranges, scales(x, w, alpha))
                self.rewriter.apply(block, pair, scales(x, w, alpha))
        return chosen, outputs

    def _best(
        self,
        trial: Trial,
        pair: Pair,
        ranges: Mapping[str, ChannelRange],
        candidates: Mapping[float, torch.Tensor],
    ) -> float | None:
        """The pair's linear layers are rounded, weights and inputs, all others are not. ``ranges``: of each layer's
        input, over all calibration."""
        schemes = {name: self.schemes[name] for name in (pair.producer, *pair.consumers) if name in self.schemes}
        weights = {name: scheme.weights for name, scheme in schemes.items()}
        errors: dict[float | None, float] = {None: trial.error(weights, roundings(schemes, ranges))}
        for alpha, scale in candidates.items():
            divided = {**ranges, **self._divided(trial.block, pair, ranges, scale)}
            with restored(trial.block, (pair.producer, *pair.consumers)):
                self.rewriter.apply(trial.block, pair, scale)
                errors[alpha] = trial.error(weights, roundings(schemes, divided))
        return min(errors, key=lambda alpha: errors[alpha])

    def _divided(
        self, block: nn.Module, pair: Pair, ranges: Mapping[str, ChannelRange], scale: torch.Tensor
    ) -> dict[str, ChannelRange]:
        """Ranges of the consumers' inputs once the pair is scaled."""
        columns = self.rewriter.columns(block, pair, scale)
        return {name: ranges[name].divided(columns) for name in pair.consumers}


def roundings(schemes: Mapping[str, LayerScheme], ranges: Mapping[str, ChannelRange]) -> dict[str, RoundInput]:
    """How the inputs of W8A8 layers will be rounded."""
    return {
        name: RoundInput(scheme.activations)
        if scheme.activations.dynamic
        else _static(scheme.activations, ranges[name])
        for name, scheme in schemes.items()
        if scheme.activations
    }


def _static(activations: ActivationScheme, range: ChannelRange) -> RoundInput:
    """The step is still to be found; that of the whole range stands for it. The trial's few tokens span less than those
    of all calibration, and theirs would make inputs look easier to round than they are."""
    low, high = min(float(range.low.min()), 0.0), max(float(range.high.max()), 0.0)
    steps = of_bounds(low, high, symmetric=activations.symmetric, dtype=torch.float32)
    return RoundInput(activations, steps.scale, steps.zero_point)
