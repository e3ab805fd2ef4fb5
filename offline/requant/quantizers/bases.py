"""The base quantizers by name, behind one signature: a layer's weight and what is known of it -> how it is rounded."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from requant_kernels.rounding import rtn
from requant_kernels.rounding.dense import QuantizedDense
from requant_kernels.rounding.grid import Grid
from requant_kernels.scheme import WeightScheme
from torch import nn

from requant.quantizers import awq, clip, gptq, kmeans
from requant.quantizers.learned import LearnedRounding
from requant.quantizers.rescaled import Rescaled
from requant.statistics import InputStatistics


@dataclass(frozen=True)
class Task:
    """One linear layer. weight fp32 [N, K]; dtype: of scales and sparse values; inputs: known of them, unless the base
    is one of DATA_FREE; excluded bool [N, K]; importance: the Fisher diagonal, fp32 [N, K], where the base asks for it
    (FISHER)."""

    weight: torch.Tensor
    scheme: WeightScheme
    dtype: torch.dtype
    inputs: InputStatistics | None
    excluded: torch.Tensor | None = None
    importance: torch.Tensor | None = None

    @property
    def statistics(self) -> InputStatistics:
        assert self.inputs is not None
        return self.inputs

    def searched(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Ranges (low, high), fp32 [N, G], with the least error on the layer's inputs."""
        importance = self.statistics.second_moment.diagonal()
        return clip.search(self.weight, self.scheme, dtype=self.dtype, importance=importance, excluded=self.excluded)


class FixedRounding(nn.Module):
    """A finished result with the face of LearnedRounding; ``target`` fp32 [N, K] holds what excluded entries keep, as
    far as residuals in the model's dtype can."""

    def __init__(self, dense: QuantizedDense, target: torch.Tensor, excluded: torch.Tensor | None) -> None:
        super().__init__()
        self.result = dense, target
        self.excluded = excluded

    def forward(self, _original: torch.Tensor | None = None) -> torch.Tensor:
        """fp32 [N, K]: what the stored layer will decode to."""
        dense, target = self.result
        decoded = dense.dequantize()
        if self.excluded is None:
            return decoded
        values = dense.codebook if dense.scale is None else dense.scale
        assert values is not None
        return torch.where(self.excluded, decoded + (target - decoded).to(values.dtype), decoded)

    def quantized(self) -> tuple[QuantizedDense, torch.Tensor]:
        return self.result


Rounding = LearnedRounding | FixedRounding | Rescaled


def _rtn(task: Task) -> Rounding:
    dense = rtn.quantize(task.weight, task.scheme, dtype=task.dtype, excluded=task.excluded)
    return FixedRounding(dense, task.weight, task.excluded)


def _clip(task: Task) -> Rounding:
    dense = clip.quantize(task.weight, task.scheme, dtype=task.dtype, excluded=task.excluded)
    return FixedRounding(dense, task.weight, task.excluded)


def _gptq(task: Task) -> Rounding:
    grid = Grid.spanning(*task.searched(), task.scheme, task.dtype)
    dense, target = gptq.quantize(task.weight, grid, task.statistics.second_moment, excluded=task.excluded)
    return FixedRounding(dense, target, task.excluded)


def _awq(task: Task) -> Rounding:
    dense = awq.quantize(task.weight, task.statistics, task.scheme, dtype=task.dtype, excluded=task.excluded)
    return FixedRounding(dense, task.weight, task.excluded)


def _kmeans(task: Task) -> Rounding:
    dense = kmeans.quantize(
        task.weight, task.scheme, dtype=task.dtype, importance=task.importance, excluded=task.excluded
    )
    return FixedRounding(dense, task.weight, task.excluded)


def _learned(task: Task) -> Rounding:
    low, high = task.searched()
    grid = Grid.spanning(low, high, task.scheme, task.dtype)
    # training starts from GPTQ's codes: it has little left to learn, and has it sooner
    _, anchor = gptq.quantize(task.weight, grid, task.statistics.second_moment, excluded=task.excluded)
    return LearnedRounding(anchor, low, high, task.scheme, dtype=task.dtype, excluded=task.excluded)


BASES: dict[str, Callable[[Task], Rounding]] = {
    "rtn": _rtn,
    "clip": _clip,
    "gptq": _gptq,
    "awq": _awq,
    "kmeans": _kmeans,
    "learned": _learned,
}
DATA_FREE = {"rtn": rtn.quantize, "clip": clip.quantize}
