"""What the inputs of linear layers look like: one pass over a block that every calibrated base quantizer shares."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from requant.errors import InputError
from requant.walk import hooked, run_block


@dataclass
class InputStatistics:
    """Sums over ``count`` tokens x of dimension K: ``outer`` of x x^T, fp32 [K, K]; ``absolute`` of |x|, fp32 [K]."""

    outer: torch.Tensor
    absolute: torch.Tensor
    count: int = 0

    @classmethod
    def empty(cls, features: int, device: torch.device) -> "InputStatistics":
        return cls(torch.zeros(features, features, device=device), torch.zeros(features, device=device))

    def add(self, x: torch.Tensor) -> None:
        """x [..., K]."""
        tokens = x.detach().float().flatten(0, -2)
        self.outer.addmm_(tokens.T, tokens)
        self.absolute += tokens.abs().sum(0)
        self.count += len(tokens)

    @property
    def second_moment(self) -> torch.Tensor:
        """E[x x^T], fp32 [K, K]."""
        return self.outer / self.count

    @property
    def mean_absolute(self) -> torch.Tensor:
        """E[|x|], fp32 [K]."""
        return self.absolute / self.count

    def rescaled(self, scale: torch.Tensor) -> "InputStatistics":
        """Those of x / scale (fp32 [K])."""
        return InputStatistics(self.outer / torch.outer(scale, scale), self.absolute / scale, self.count)


@torch.no_grad()
def collect(
    block: nn.Module, linears: Mapping[str, nn.Linear], inputs: Sequence[torch.Tensor], keywords: dict[str, Any]
) -> dict[str, InputStatistics]:
    """Statistics of the inputs of ``linears`` (names -> layers of ``block``) while ``block`` runs on ``inputs``.

    inputs: hidden states [B, T, C], of the already quantized preceding blocks. Layers that are fed the same tensor
    share one InputStatistics; layers that no token reaches have none.
    """
    found: dict[str, InputStatistics] = {}
    last: tuple[torch.Tensor, InputStatistics] | None = None

    def note(name: str, linear: nn.Linear) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[torch.Tensor]) -> None:
            nonlocal last
            if last is not None and last[0] is args[0] and found.get(name, last[1]) is last[1]:
                found[name] = last[1]
                return
            if name not in found:
                found[name] = InputStatistics.empty(linear.in_features, args[0].device)
            found[name].add(args[0])
            last = args[0], found[name]

        return hook

    with hooked({linear: note(name, linear) for name, linear in linears.items()}):
        for hidden in inputs:
            run_block(block, hidden, keywords)
    return {name: statistics for name, statistics in found.items() if statistics.count}


@torch.no_grad()
def reached(
    block: nn.Module, linears: Mapping[str, nn.Linear], inputs: Sequence[torch.Tensor], keywords: dict[str, Any]
) -> set[str]:
    """Which of ``linears`` any token of ``inputs`` comes to: ``collect`` without the cost of statistics."""
    found: set[str] = set()

    def note(name: str) -> Callable[..., None]:
        return lambda _, args: found.update([name] if args[0].numel() else [])

    with hooked({linear: note(name) for name, linear in linears.items()}):
        for hidden in inputs:
            run_block(block, hidden, keywords)
    return found


def refuse_unreached(layers: Iterable[str]) -> None:
    """Raises InputError naming the first of ``layers``, all those that no token reaches, unless there are none."""
    if names := list(layers):
        raise InputError(
            f"{names[0]}: no calibration token reaches this layer ({len(names)} in its block); calibrate on more, or "
            "other, text, or have such layers rounded to nearest (--unreached rtn)"
        )
