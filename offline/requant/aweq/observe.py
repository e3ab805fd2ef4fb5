"""What flows through a block: inputs of its layers, and what leaves it."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from requant.aweq.equalization import ChannelRange
from requant.walk import Stop, hooked, run_block


@torch.no_grad()
def inputs_of(
    block: nn.Module, names: Sequence[str], hidden: Sequence[torch.Tensor], keywords: Mapping[str, Any]
) -> dict[str, list[torch.Tensor]]:
    """The input [T, K] of each layer of ``names``, which stand in the order in which they run, for each of ``hidden``
    [B, T, C]. What a layer is given, not what a hook makes of it; each run ends at the last."""
    found: dict[str, list[torch.Tensor]] = {name: [] for name in names}

    def note(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[torch.Tensor]) -> None:
            found[name].append(args[0].flatten(0, -2))
            if name == names[-1]:
                raise Stop

        return hook

    with hooked({block.get_submodule(name): note(name) for name in names}, first=True):
        for sample in hidden:
            with suppress(Stop):
                run_block(block, sample, keywords)
    return found


@torch.no_grad()
def input_ranges(
    block: nn.Module, names: Sequence[str], hidden: Sequence[torch.Tensor], keywords: Mapping[str, Any]
) -> tuple[dict[str, ChannelRange], list[torch.Tensor]]:
    """The range of each input channel of the layers ``names``, and the block's outputs [B, T, C]."""
    ranges: dict[str, ChannelRange] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[torch.Tensor]) -> None:
            seen = ChannelRange.of(args[0])
            ranges[name] = ranges[name].union(seen) if name in ranges else seen

        return hook

    with hooked({block.get_submodule(name): note(name) for name in names}):
        return ranges, [run_block(block, sample, keywords) for sample in hidden]
