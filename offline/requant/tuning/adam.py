"""Adam whose state may lie memory-mapped on disk, one parameter at a time: for gradients that are never all there."""

from collections.abc import Mapping

import torch
from torch import nn

from requant.sensitivity.store import TensorStore

FIRST_DECAY, SECOND_DECAY, EPSILON = 0.9, 0.95, 1e-12


class StreamedAdam:
    """Adam (arXiv 1412.6980, Algorithm 1) over ``parameters``; ``rates`` by name."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        rates: Mapping[str, float],
        first: TensorStore,
        second: TensorStore,
    ) -> None:
        self._parameters, self._rates = parameters, rates
        self._first = {name: first.zeros(name, parameter.shape) for name, parameter in parameters.items()}
        self._second = {name: second.zeros(name, parameter.shape) for name, parameter in parameters.items()}
        self.step, self.share = 0, 1.0

    def begin_step(self, share: float) -> None:
        """Before each backward pass; ``share``: of the full learning rate."""
        self.step, self.share = self.step + 1, share

    @torch.no_grad()
    def update(self, name: str, gradient: torch.Tensor) -> None:
        """Moves one parameter. A sink of streamed_gradients."""
        first, second = self._first[name], self._second[name]
        gradient = gradient.cpu()
        first.lerp_(gradient, 1 - FIRST_DECAY)
        second.lerp_(gradient.square(), 1 - SECOND_DECAY)
        denominator = (second / (1 - SECOND_DECAY**self.step)).sqrt_().add_(EPSILON)
        rate = self._rates[name] * self.share / (1 - FIRST_DECAY**self.step)
        parameter = self._parameters[name]
        parameter.addcdiv_(first.to(parameter.device), denominator.to(parameter.device), value=-rate)
