"""What a pass of gradients will cost, said before it starts."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from requant.sensitivity.store import TensorStore
from requant.walk import entering, hooked

# A streamed gradient takes the time of so many forward passes: the pass itself, the same again block by block, and
# twice that for the gradients by inputs and by weights.
FORWARDS = 4
GIB = 2**30


@dataclass(frozen=True)
class Estimate:
    """Seconds; bytes of memory, beside the model and both ends of the path, and of disk."""

    seconds: float
    memory: int
    disk: int

    def __str__(self) -> str:
        duration = f"{self.seconds / 60:.0f} min" if self.seconds >= 90 else f"{self.seconds:.0f} s"
        disk = f"{self.disk / GIB:.2f} GiB" if self.disk else "none"
        return f"about {duration}; memory {self.memory / GIB:.2f} GiB beside the model; disk {disk}"


@torch.no_grad()
def estimate(
    forward: Callable[[], object], blocks: Sequence[nn.Module], passes: int, accumulators: Sequence[TensorStore]
) -> Estimate:
    """Of ``passes`` streamed gradients like that of ``forward``, which is run once to be timed.

    Memory: the accumulators that are not on disk, the hidden states between blocks, the gradients of the largest block.
    """
    hidden: list[int] = []

    def note(_: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        hidden.append(entering(args, keywords).nbytes)

    started = time.monotonic()
    with hooked({blocks[0]: note}, keywords=True):
        forward()
    seconds = time.monotonic() - started
    memory = sum(store.nbytes for store in accumulators if not store.mapped)
    disk = sum(store.nbytes for store in accumulators if store.mapped)
    largest = max(sum(parameter.nbytes for parameter in block.parameters()) for block in blocks)
    return Estimate(FORWARDS * passes * seconds, memory + len(blocks) * hidden[0] + largest, disk)
