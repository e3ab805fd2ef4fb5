"""AWEQ's two steps in the walk over a model's blocks: before a block is rounded, and after."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from requant_kernels.layer import QuantizedLayer
from requant_kernels.scheme import LayerScheme
from transformers import PreTrainedConfig

from requant.architecture import Architecture
from requant.aweq.ending import Ending
from requant.aweq.rewrite import Rewriter
from requant.aweq.search import Equalizer
from requant.aweq.settle import Note, Settler, Side
from requant.recipe import Recipe
from requant.walk import run_block


@dataclass(frozen=True)
class Steps:
    """``schemes``: of the layers to quantize, by full name. ``dtype``: in which the model is stored. ``alphas`` by the
    full name of a pair's producer, and ``notes`` by that of a layer, fill while blocks go by."""

    recipe: Recipe
    architecture: Architecture
    schemes: Mapping[str, LayerScheme]
    config: PreTrainedConfig
    dtype: torch.dtype
    alphas: dict[str, float | None] = field(default_factory=dict)
    notes: dict[str, Note] = field(default_factory=dict)

    def equalize(self, prefix: str, original: Side) -> list[torch.Tensor]:
        """Rewrites the block, which stays the same function, where the recipe wants it; returns what leaves it."""
        if not self.recipe.equalization.wanted:
            return [run_block(original.block, hidden, original.keywords) for hidden in original.hidden]
        rewriter = Rewriter.of(self.config, self.architecture, self.dtype)
        equalizer = Equalizer(rewriter, self.recipe.equalization, self._local(prefix, self.schemes))
        alphas, outputs = equalizer.equalize(original.block, original.hidden, original.keywords)
        self.alphas.update({f"{prefix}.{producer}": alpha for producer, alpha in alphas.items()})
        return outputs

    def settle(
        self,
        prefix: str,
        layers: Mapping[str, QuantizedLayer],
        original: Side,
        outputs: Sequence[torch.Tensor],
        hidden: Sequence[torch.Tensor],
        *,
        ending: Ending | None = None,
    ) -> tuple[dict[str, QuantizedLayer], list[torch.Tensor]]:
        """layers: the block's, by full name; ``outputs`` [B, T, C]: the original block's; ``hidden``: what enters the
        quantized one; ``ending``: what runs after it, where anything is to be corrected. Returns the layers with all
        that they lack, and what the quantized block puts out."""
        quantized = Side(deepcopy(original.block), hidden, original.keywords)
        local = self._local(prefix, layers)
        settings = {name: self.recipe.activations_of(f"{prefix}.{name}") for name in local}
        settler = Settler(original, outputs, quantized, settings, ending)
        stages = self.architecture.of(original.block).stages
        settled, notes = settler.settle(stages, local, self._local(prefix, self.schemes))
        self.notes.update({f"{prefix}.{name}": note for name, note in notes.items()})
        after = [run_block(quantized.block, sample, original.keywords) for sample in hidden]
        return {f"{prefix}.{name}": layer for name, layer in settled.items()}, after

    def report(self) -> dict[str, dict[str, Any]]:
        """What was decided, by the full name of a layer or a norm."""
        found = {name: {"alpha": alpha} for name, alpha in self.alphas.items()}
        for name, note in self.notes.items():
            facts = {key: value for key, value in asdict(note).items() if value is not None}
            found[name] = found.get(name, {}) | facts
        return found

    @staticmethod
    def _local(prefix: str, named: Mapping[str, Any]) -> dict[str, Any]:
        return {name[len(prefix) + 1 :]: one for name, one in named.items() if name.startswith(f"{prefix}.")}
