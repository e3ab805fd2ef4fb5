"""The model that a calibrated run quantizes in place, and what every step of the run asks of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from requant_kernels.rounding import rtn
from requant_kernels.scheme import LayerScheme, WeightScheme
from torch import nn
from transformers import PreTrainedModel

from requant import models
from requant.architecture import Architecture
from requant.quantizers import clip, kmeans
from requant.recipe import Recipe
from requant.sensitivity.pqi import Path
from requant.sensitivity.store import Stores, TensorStore

Samples = Sequence[torch.Tensor]
Masks = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Subject:
    """``network`` computes in fp32 and is stored in ``dtype``; ``schemes``: the layers to quantize, by full name.

    The network may be rewritten (AWQ, AWEQ) into another that is the same function; all else stays. ``stores`` hold
    what else is as large as the model: gradients, both ends of their path, the optimizer's moments.
    """

    network: PreTrainedModel
    architecture: Architecture
    schemes: Mapping[str, LayerScheme]
    recipe: Recipe
    dtype: torch.dtype
    stores: Stores = TensorStore

    @property
    def linears(self) -> dict[str, nn.Linear]:
        found = models.linears(self.network, self.architecture)
        return {name: linear for name, linear in found.items() if name in self.schemes}

    @property
    def blocks(self) -> list[nn.Module]:
        return [block for _, block in models.blocks(self.network, self.architecture)]

    @property
    def sparse_weights(self) -> dict[str, torch.Tensor]:
        """Of the layers with a sparse part, where the network is, by full name."""
        return {name: one.weight.detach() for name, one in self.linears.items() if self.schemes[name].sparse}

    def loss(self, ids: torch.Tensor) -> torch.Tensor:
        """Mean next-token cross-entropy; ids: int64 [B, T]."""
        return self.network(input_ids=ids, labels=ids, use_cache=False).loss

    def path(self, rounded: bool) -> Path:
        """From the weights of the layers with a sparse part to their first quantization, on searched ranges, or from
        all to themselves."""
        linears = {name: one for name, one in self.linears.items() if self.schemes[name].sparse or not rounded}
        parameters = {name: linear.get_parameter("weight") for name, linear in linears.items()}
        start, end = self.stores(), self.stores()
        for name, weight in parameters.items():
            start.copy(name, weight.detach())
            if rounded:
                end.copy(name, self.first_rounded(name, weight.detach(), None))
        return Path(self.blocks, parameters, self.loss, start, end if rounded else start, self.stores)

    def first_rounded(self, name: str, weight: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """The layer's weight, fp32 [N, K], as it is before any base; entries in ``mask`` keep their values."""
        weight = weight.to(self.network.device)
        mask = None if mask is None else mask.to(weight.device)
        decoded = self.searched(weight, self.schemes[name].weights, mask)
        return decoded if mask is None else torch.where(mask, weight, decoded)

    def searched(self, weight: torch.Tensor, scheme: WeightScheme, mask: torch.Tensor | None = None) -> torch.Tensor:
        """``weight`` fp32 [N, K], rounded where the network is, on searched ranges that pass over the entries in
        ``mask``, which is there already."""
        quantize = kmeans.quantize if scheme.codebook else clip.quantize
        return quantize(weight.to(self.network.device), scheme, dtype=self.dtype, excluded=mask).dequantize()

    def nearest(self, weight: torch.Tensor, scheme: WeightScheme) -> torch.Tensor:
        """What many candidate schemes are compared by: without the search of ranges, which costs twentyfold."""
        quantize = kmeans.quantize if scheme.codebook else rtn.quantize
        return quantize(weight.to(self.network.device), scheme, dtype=self.dtype).dequantize()
