"""What a change in one block does to the end of the model: an error that a layer, or its block, does not show. Ours.

Tokens that all others attend to are the reason: a constant that brings the average token closer to the original may
move these away from it, and what they mean to the others comes out blocks later.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn

from requant.aweq.error import relative_weights, weighted_error
from requant.walk import run_block

TOKENS = 1024  # that decide: two runs of the rest of the model for each choice


@dataclass(frozen=True)
class Ending:
    """``blocks``: the unquantized ones that are still to run, with the ``keywords`` of each; ``wanted`` [B, T, C]: what
    the original model's last block puts out for each sample that decides."""

    blocks: Sequence[nn.Module]
    keywords: Sequence[Mapping[str, Any]]
    wanted: Sequence[torch.Tensor]

    @classmethod
    def of(
        cls, blocks: Sequence[nn.Module], keywords: Sequence[Mapping[str, Any]], hidden: Sequence[torch.Tensor]
    ) -> Self:
        """Of a model that no block has run of; hidden [B, T, C]: what enters its first block, of samples of which the
        first few decide."""
        whole, few = cls(blocks, keywords, ()), max(1, TOKENS // hidden[0].shape[:-1].numel())
        return cls(blocks, keywords, [whole._last(sample) for sample in hidden[:few]])

    def after(self, count: int) -> Self:
        """When the first ``count`` blocks have run."""
        return type(self)(self.blocks[count:], self.keywords[count:], self.wanted)

    @torch.no_grad()
    def error(self, hidden: Sequence[torch.Tensor]) -> float:
        """hidden [B, T, C]: what leaves the block, of the same samples. Returns the mean over all tokens of
        |y' - y|^2 / |y|^2 of the last hidden state, which is what the final norm makes of it."""
        return weighted_error((self._last(sample) for sample in hidden), self.wanted, relative_weights(self.wanted))

    @torch.no_grad()
    def _last(self, hidden: torch.Tensor) -> torch.Tensor:
        for block, keywords in zip(self.blocks, self.keywords, strict=True):
            hidden = run_block(block, hidden, keywords)
        return hidden
