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

    Sums in fp32. Which tokens an expert gets is known on the device only, and a CUDA graph can not ask; while one is
    recorded, all experts run on all tokens.
    """
    recording = x.is_cuda and torch.cuda.is_current_stream_capturing()
    return (on_all_tokens if recording else on_their_tokens)(x, weights, ids, experts).to(x.dtype)


def on_their_tokens(
    x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, experts: Sequence[Layer]
) -> torch.Tensor:
    """fp32 [M, C]: every expert runs on the tokens that are routed to it. Waits for the device once."""
    output = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    flat, shares = ids.flatten().long(), weights.float().flatten()
    counts = torch.bincount(flat, minlength=len(experts)).tolist()
    places = torch.split(flat.argsort(stable=True), counts)
    for expert, place in zip(experts, places, strict=True):
        if len(place):
            token = place // ids.shape[1]
            output.index_add_(0, token, expert(x[token]).float() * shares[place, None])
    return output


def on_all_tokens(x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, experts: Sequence[Layer]) -> torch.Tensor:
    """fp32 [M, C]: every expert runs on every token, and counts where the token is routed to it. Never waits."""
    output = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for index, expert in enumerate(experts):
        routed = ids == index
        share = (weights.float() * routed).sum(1, keepdim=True)
        # elsewhere its output may be infinite, which no factor of zero undoes
        output += (expert(x).float() * share).masked_fill(~routed.any(1, keepdim=True), 0)
    return output
