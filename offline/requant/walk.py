"""Running a model block by block, so that calibration never needs more than one block at work."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class BlockCalls:
    """How a model calls its decoder blocks: hidden states [B, T, C] that enter the first, one tensor per sample, and
    the keyword arguments of each block (positions, masks), which are the same for all samples of one shape."""

    hidden: list[torch.Tensor]
    keywords: list[dict[str, Any]]


class Stop(Exception):
    """A hook raises it where the rest of a run is of no use."""


@contextmanager
def hooked(
    hooks: Mapping[nn.Module, Callable[..., Any]], *, first: bool = False, keywords: bool = False
) -> Iterator[None]:
    """Inside, each module runs its forward pre-hook; ``first``: before any that is there already; ``keywords``: hooks
    take keyword arguments as well."""
    handles = [
        module.register_forward_pre_hook(hook, prepend=first, with_kwargs=keywords) for module, hook in hooks.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def entering(args: tuple[Any, ...], keywords: Mapping[str, Any]) -> torch.Tensor:
    """The hidden states [B, T, C] among what a model calls a block with."""
    hidden: torch.Tensor = args[0] if args else keywords["hidden_states"]
    return hidden


@torch.no_grad()
def block_calls(model: PreTrainedModel, blocks: Sequence[nn.Module], samples: Sequence[torch.Tensor]) -> BlockCalls:
    """Observes ``model`` on ``samples`` (token ids int64 [B, T], all of one shape): one full run to see every block's
    keywords, and for each sample a run that ends at the first block."""
    calls = BlockCalls([], [{} for _ in blocks])

    def note_keywords(index: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            calls.keywords[index].update({k: v for k, v in keywords.items() if k != "hidden_states"})

        return hook

    def note_hidden(_: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        calls.hidden.append(entering(args, keywords))
        raise Stop

    with hooked({block: note_keywords(index) for index, block in enumerate(blocks)}, keywords=True):
        model(input_ids=samples[0], use_cache=False)
    with hooked({blocks[0]: note_hidden}, keywords=True):
        for sample in samples:
            with suppress(Stop):
                model(input_ids=sample, use_cache=False)
    return calls


def run_block(block: nn.Module, hidden: torch.Tensor, keywords: Mapping[str, Any]) -> torch.Tensor:
    """hidden [B, T, C] -> [B, T, C], as the model would."""
    output = block(hidden, **keywords)
    return output if isinstance(output, torch.Tensor) else output[0]
