"""How much an error of a block's output matters: one weight for each token, used wherever AWEQ compares two choices.

A plain squared error sees only the few tokens of massive activations, whose hidden states are thousands of times
larger; one relative to each token's own state, which is what the norms after it see, gives those tokens, which every
other token attends to, no more say than any other. So half of the weight goes by each measure. Ours.
"""

from collections.abc import Iterable, Sequence

import torch


def relative_weights(outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """outputs: [B, T, C] for each sample -> [B T] each: w = 1 / (n |y|^2) over n tokens, 0 for a token that is zero.

    An error as large as the output itself then weighs 1 in all.
    """
    squares = _squares(outputs)
    count = sum(len(square) for square in squares)
    return [torch.where(square > 0, 1 / (count * square), 0) for square in squares]


def token_weights(outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """outputs: of a block, [B, T, C] for each sample -> [B T] each: w = 1 / (n |y|^2) + 1 / sum |y|^2 over n tokens.

    An error as large as the output itself then weighs 2 in all. A token whose output is zero weighs nothing by itself.
    """
    total = sum(float(square.sum()) for square in _squares(outputs))
    share = 1 / total if total else 0.0
    return [relative + share for relative in relative_weights(outputs)]


def _squares(outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [output.flatten(0, -2).float().square().sum(-1) for output in outputs]


def weighted_error(
    found: Iterable[torch.Tensor], wanted: Iterable[torch.Tensor], weights: Iterable[torch.Tensor]
) -> float:
    """Sum of w |found - wanted|^2 over the tokens of all samples."""
    return sum(
        float((one - other).flatten(0, -2).square().sum(-1) @ weight)
        for one, other, weight in zip(found, wanted, weights, strict=True)
    )
