"""Perplexity over non-overlapping windows, as the field measures it."""

from collections.abc import Iterable

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from requant.errors import InputError


def windows(ids: torch.Tensor, seqlen: int, tokens: int | None = None) -> torch.Tensor:
    """ids int64 [T] -> [T' // seqlen, seqlen] with T' = min(T, tokens); what is left over is dropped.

    Raises InputError where not even one window is filled.
    """
    if seqlen < 2:
        raise InputError(f"seqlen {seqlen}: a window needs at least 2 tokens, one to predict from")
    count = min(len(ids), len(ids) if tokens is None else tokens) // seqlen
    if count < 1:
        limit = "" if tokens is None else f", limited to {tokens}"
        raise InputError(f"the text has {len(ids)} tokens{limit}: too few for one window of {seqlen}")
    return ids[: count * seqlen].view(count, seqlen)


@torch.no_grad()
def perplexity(model: PreTrainedModel, batches: Iterable[torch.Tensor]) -> float:
    """exp of the mean negative log-likelihood over every window's seqlen - 1 targets.

    batches: windows int64 [seqlen], each seen with no context but its own. Raises InputError where a loss is not
    finite.
    """
    total, targets = 0.0, 0
    for ids in batches:
        window = ids.to(model.device)
        logits = model(input_ids=window[None], use_cache=False).logits[0, :-1].float()
        loss = float(cross_entropy(logits, window[1:], reduction="sum"))
        if not loss < float("inf"):
            raise InputError(f"the model's loss is {loss} in window {targets // (len(ids) - 1) + 1}")
        total, targets = total + loss, targets + len(ids) - 1
    return float(torch.tensor(total / targets, dtype=torch.float64).exp())
