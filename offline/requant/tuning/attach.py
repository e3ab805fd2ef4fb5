"""Makes linear layers compute with weights that are being trained, and puts plain weights back."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn
from torch.nn.utils import parametrize


@contextmanager
def trainable(layers: Mapping[str, nn.Linear], roundings: Mapping[str, nn.Module]) -> Iterator[None]:
    """Inside, each of ``layers`` computes with the weight that its rounding gives; its own returns after."""
    for name, rounding in roundings.items():
        layers[name].weight.requires_grad_(False)
        parametrize.register_parametrization(layers[name], "weight", rounding)
    try:
        yield
    finally:
        for name in roundings:
            parametrize.remove_parametrizations(layers[name], "weight", leave_parametrized=False)
