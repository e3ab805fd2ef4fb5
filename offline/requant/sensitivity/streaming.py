"""Gradients of a whole model with the memory of one block.

Only the boundary activations of the blocks are kept; each block is recomputed in the backward pass, and the gradient
of every parameter goes to a sink and is freed as soon as it exists.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

Sink = Callable[[str, torch.Tensor], None]


@contextmanager
def streamed_gradients(
    blocks: Sequence[nn.Module], parameters: Mapping[str, nn.Parameter], sink: Sink
) -> Iterator[None]:
    """Inside, each ``loss.backward()`` calls ``sink(name, gradient)`` for each of ``parameters`` and keeps no gradient.

    ``sink`` must not keep the tensor it is given. Gradients equal those of an ordinary backward pass: the same
    operations run, only later. Whatever ``requires_grad`` and ``forward`` were is restored on leaving.
    """
    forwards = [block.forward for block in blocks]
    required = {name: parameter.requires_grad for name, parameter in parameters.items()}
    handles = []
    for name, parameter in parameters.items():
        parameter.requires_grad_(True)
        hook = partial(_hand_over, sink, name)
        handles.append(parameter.register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]
    for block, forward in zip(blocks, forwards, strict=True):
        block.forward = partial(checkpoint, forward, use_reentrant=False)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward  # the instance attribute; the class's method shows again
        for handle in handles:
            handle.remove()
        for name, parameter in parameters.items():
            parameter.requires_grad_(required[name])


def _hand_over(sink: Sink, name: str, parameter: torch.Tensor) -> None:
    assert parameter.grad is not None
    sink(name, parameter.grad)
    parameter.grad = None
