"""A layer of routed experts, run expert by expert: right for every kind of quantized layer, and what faster ways are to
be compared with."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import silu

Layer = Callable[[torch.Tensor], torch.Tensor]  # a linear one, or a whole expert


@dataclass(frozen=True)
class Expert:
    """gate_up: [M, C] -> [M, 2 I], gates first; down: [M, I] -> [M, C]."""

    gate_up: Layer
    down: Layer

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(silu(gate) * up)


def run_experts(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, experts: Sequence[Layer]) -> torch.Tensor:
    """x [M, C], the experts of each token ids [M, k] (no one twice) and their weights [M, k] -> [M, C] of x's dtype.

    Every expert runs on the tokens that are routed to it; sums in fp32. Which those are only the device knows: waits
    for it once, so a CUDA graph can not record it.
    """
    output = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    flat = ids.flatten().long()
    counts = torch.bincount(flat, minlength=len(experts)).tolist()
    order = flat.argsort(stable=True)
    tokens = torch.split(order // ids.shape[1], counts)
    shares = torch.split(weights.float().flatten()[order, None], counts)
    for expert, token, share in zip(experts, tokens, shares, strict=True):
        if len(token):
            output.index_add_(0, token, expert(x[token]).float() * share)
    return output.to(x.dtype)
