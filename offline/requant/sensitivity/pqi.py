"""Post-quantization integral: the loss change from quantization, attributed to single weights (arXiv 2503.01901).

With d = w~ - w,  dF = sum_i d_i INT_0^1 g_i(w + t d) dt  holds exactly (derived), so the sum of all elements is a test
of the implementation: it must equal the measured change of the loss up to the error of the quadrature.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from requant.progress import say, track
from requant.sensitivity.estimate import estimate
from requant.sensitivity.store import Stores, TensorStore
from requant.sensitivity.streaming import streamed_gradients

Loss = Callable[[torch.Tensor], torch.Tensor]
Weights = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class PathGradients:
    """Moments over samples of G_s = INT g_s(w + t d) dt, where g_s is the gradient of sample s's mean token loss.

    mean: fp32 [N, K] by name, E_s[G_s]; square: E_s[G_s^2], or empty where it was not asked for.
    """

    mean: TensorStore
    square: TensorStore


@dataclass(frozen=True)
class Completeness:
    """The acceptance test of a path integral: its sum against the measured change of the loss (nats per token).

    matrices: what each contributes to the sum, by name.
    """

    matrices: Mapping[str, float]
    measured: float

    @property
    def integral(self) -> float:
        return sum(self.matrices.values())

    @property
    def error(self) -> float:
        """Relative, signed; 0 where nothing changes, as with a model that lies on the grid already."""
        return (self.integral - self.measured) / (self.measured or self.integral or 1.0)

    def to_dict(self) -> dict[str, Any]:
        percent = round(100 * self.error, 4)
        return {"integral": self.integral, "measured": self.measured, "error_percent": percent} | asdict(self)


@dataclass(frozen=True)
class Path:
    """The straight line from ``start`` to ``end``, walked by the model's own ``parameters``.

    blocks: the modules to be recomputed in the backward pass, loss: a batch of token ids int64 [B, T] -> its mean token
    loss. All mappings share their keys. ``start`` and ``end`` are fp32, on the CPU, as is what ``stores`` makes for
    gradients.
    """

    blocks: Sequence[nn.Module]
    parameters: Mapping[str, nn.Parameter]
    loss: Loss
    start: Weights
    end: Weights
    stores: Stores = TensorStore

    @torch.no_grad()
    def move_to(self, t: float) -> None:
        """Sets the model's weights to start + t (end - start)."""
        for name, parameter in self.parameters.items():
            torch.lerp(self.start[name].to(parameter), self.end[name].to(parameter), t, out=parameter.data)

    @torch.no_grad()
    def loss_at(self, t: float, samples: Sequence[torch.Tensor]) -> float:
        """Mean over ``samples`` of the loss at t. Raises ValueError where it is not finite."""
        self.move_to(t)
        value = sum(float(self.loss(sample)) for sample in samples) / len(samples)
        _require_finite(value, t)
        return value

    def gradients(
        self,
        samples: Sequence[torch.Tensor],
        points: Sequence[tuple[float, float]],
        *,
        second_moment: bool = False,
    ) -> PathGradients:
        """Integrates the gradient over ``points`` (quadrature.nodes) for each of ``samples`` (int64 [B, T] each).

        Averages over samples and points before anything is squared or multiplied by d. With ``second_moment`` a sample
        is walked to the end before the next begins, which costs one more accumulator and one pass over the weights for
        every sample and point. Leaves the model at the path's start. Raises ValueError where a loss is not finite.
        """
        mean, square = self._accumulator(), self._accumulator() if second_moment else TensorStore()
        part = self._accumulator() if second_moment else mean
        scale = 1.0 if second_moment else 1 / len(samples)
        passes, accumulators = len(samples) * len(points), [mean, square, part] if second_moment else [mean]
        # float() waits for a GPU to be done
        cost = estimate(lambda: float(self.loss(samples[0])), self.blocks, passes, accumulators)
        say(f"path integral: {passes} passes, {cost}")
        groups = [[sample] for sample in samples] if second_moment else [samples]
        steps = [(group, t, weight) for group in groups for t, weight in points]
        for done, (group, t, weight) in track(enumerate(steps, start=1), len(steps), "path integral"):
            self._add_gradients(part, group, t, weight * scale)
            if second_moment and done % len(points) == 0:
                _add_moments(part, mean, square, 1 / len(samples))
        self.move_to(0.0)
        return PathGradients(mean, square)

    def _accumulator(self) -> TensorStore:
        store = self.stores()
        for name, parameter in self.parameters.items():
            store.zeros(name, parameter.shape)
        return store

    def _add_gradients(self, into: TensorStore, samples: Sequence[torch.Tensor], t: float, scale: float) -> None:
        self.move_to(t)

        def accumulate(name: str, gradient: torch.Tensor) -> None:
            into[name].add_(gradient.cpu(), alpha=scale)

        with streamed_gradients(self.blocks, self.parameters, accumulate):
            for sample in samples:
                loss = self.loss(sample)
                _require_finite(float(loss.detach()), t)
                loss.backward()  # type: ignore[no-untyped-call]


def _add_moments(part: TensorStore, mean: TensorStore, square: TensorStore, share: float) -> None:
    for name, gradient in part.items():
        mean[name].add_(gradient, alpha=share)
        square[name].addcmul_(gradient, gradient, value=share)
        gradient.zero_()


def _require_finite(loss: float, t: float) -> None:
    if not loss < float("inf"):
        raise ValueError(f"the loss is {loss} at t={t:g} of the path: the quantized weights break the model")


def elements(path: Path, gradients: PathGradients, name: str) -> torch.Tensor:
    """Signed contributions of one matrix's entries to dF: pqi_i = d_i E_s[G_s,i], fp32 [N, K] (derived from Eq. 1)."""
    return (path.end[name].float() - path.start[name].float()) * gradients.mean[name]


def completeness(path: Path, gradients: PathGradients, samples: Sequence[torch.Tensor]) -> Completeness:
    """Compares the sum of all elements with the measured change of the loss. Leaves the model at the path's start."""
    matrices = {name: float(elements(path, gradients, name).double().sum()) for name in path.parameters}
    measured = path.loss_at(1.0, samples) - path.loss_at(0.0, samples)
    return Completeness(matrices, measured)
