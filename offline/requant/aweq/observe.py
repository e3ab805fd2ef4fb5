"""What flows through a block: inputs of its layers, and what leaves it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from requant.aweq.equalization import ChannelRange
from requant.walk import run_block


class _Stop(Exception):
    pass


@contextmanager
def hooked(block: nn.Module, hooks: Mapping[str, Any], *, first: bool = False) -> Iterator[None]:
    """Inside, the layers named run these forward pre-hooks; ``first``: before any hook that is there already."""
    handles = [block.get_submodule(name).register_forward_pre_hook(hook, prepend=first) for name, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def inputs_of(
    block: nn.Module, names: Sequence[str], hidden: Sequence[torch.Tensor], keywords: Mapping[str, Any]
) -> dict[str, list[torch.Tensor]]:
    """The input [T, K] of each layer of ``names``, which stand in the order in which they run, for each of ``hidden``
    [B, T, C]. What a layer is given, not what a hook makes of it; each run ends at the last."""
    found: dict[str, list[torch.Tensor]] = {name: [] for name in names}

    def note(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[torch.Tensor]) -> None:
            found[name].append(args[0].flatten(0, -2))
            if name == names[-1]:
                raise _Stop

        return hook

    with hooked(block, {name: note(name) for name in names}, first=True):
        for sample in hidden:
            try:
                run_block(block, sample, dict(keywords))
            except _Stop:
                continue
    return found


@torch.no_grad()
def input_ranges(
    block: nn.Module, names: Sequence[str], hidden: Sequence[torch.Tensor], keywords: Mapping[str, Any]
) -> tuple[dict[str, ChannelRange], list[torch.Tensor]]:
    """The range of each input channel of the layers ``names``, and the block's outputs [B, T, C]."""
    ranges: dict[str, ChannelRange] = {}

    def note(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[torch.Tensor]) -> None:
            seen = ChannelRange.of(args[0])
            ranges[name] = ranges[name].union(seen) if name in ranges else seen

        return hook

    with hooked(block, {name: note(name) for name in names}):
        return ranges, [run_block(block, sample, dict(keywords)) for sample in hidden]
