"""One block of a calibrated run: its layers rounded by their base, and trained where that learns."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from requant_kernels.layer import QuantizedLayer
from requant_kernels.rounding.dense import attach_residual
from torch import nn

from requant.aweq import int8
from requant.aweq.rewrite import Rewriter
from requant.calibrated.subject import Masks, Subject
from requant.quantizers import awq, kept
from requant.quantizers.bases import BASES, FixedRounding, Rounding, Task
from requant.quantizers.learned import LearnedRounding
from requant.settings import DATA_FREE, EQUALIZED
from requant.stages import Result
from requant.statistics import InputStatistics, collect, reached, refuse_unreached
from requant.tuning.attach import trainable
from requant.tuning.blockwise import train_block
from requant.walk import run_block

Pairs = list[tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Block:
    """A decoder block at work: its name, itself, its layers to quantize by full name, how the model calls it."""

    prefix: str
    module: nn.Module
    linears: dict[str, nn.Linear]
    keywords: dict[str, Any]

    def run(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden, and what is returned: fp32 [B, T, C]."""
        return run_block(self.module, hidden, self.keywords)


@dataclass(frozen=True)
class BlockRounding:
    """How the layers of any block are rounded. Entries in ``masks`` bool [N, K] stay exact; ``importance``: the Fisher
    diagonal, fp32 [N, K], where the base asks for it; both by full name, on the CPU."""

    subject: Subject
    masks: Masks
    importance: Mapping[str, torch.Tensor]

    def rounded(self, block: Block, inputs: list[torch.Tensor]) -> tuple[dict[str, Rounding], list[str]]:
        """On their base, before any training; and those of them that no token reaches, which are rounded to nearest."""
        recipe, statistics = self.subject.recipe, dict[str, InputStatistics]()
        if recipe.base not in DATA_FREE:
            statistics = collect(block.module, block.linears, inputs, block.keywords)
        found = self._reached(block, statistics, inputs)
        if recipe.base in EQUALIZED:
            self._equalize(block, statistics)
        made = {
            name: self._rounding(
                name,
                Task(
                    linear.weight.detach(),
                    self.subject.schemes[name].weights,
                    self.subject.dtype,
                    statistics.get(name),
                    self._at_work(self.masks, name),
                    self._at_work(self.importance, name),
                ),
                name in found,
            )
            for name, linear in block.linears.items()
        }
        return made, [name for name in made if name not in found]

    def trained(self, block: Block, pairs: Pairs) -> Result:
        """Rounded so that the inputs of ``pairs`` give their outputs, and taken apart for keeping."""
        made, unreached = self.rounded(block, [hidden for hidden, _ in pairs])
        learned = [rounding for rounding in made.values() if isinstance(rounding, LearnedRounding)]
        if learned:
            recipe = self.subject.recipe
            with trainable(block.linears, made), torch.enable_grad():
                train_block(block.run, learned, pairs, recipe.training, recipe.seed)
        tensors = {f"{name}|{part}": t for name, one in made.items() for part, t in kept.tensors_of(one).items()}
        if self.subject.recipe.base in EQUALIZED:
            tensors |= {f"|{name}": parameter for name, parameter in block.module.named_parameters()}
        return tensors, {"unreached": unreached}

    def put_back(self, block: Block, tensors: Mapping[str, torch.Tensor]) -> dict[str, Rounding]:
        """What ``trained`` took apart, in this run or an earlier one."""
        parts: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in tensors.items():
            name, part = key.split("|")
            parts.setdefault(name, {})[part] = tensor.to(self.subject.network.device)
        for name, tensor in parts.get("", {}).items():
            block.module.get_parameter(name).copy_(tensor)
        return {
            name: kept.rebuilt(
                parts[name],
                self.subject.schemes[name].weights,
                self.subject.dtype,
                self._at_work(self.masks, name),
            )
            for name in block.linears
        }

    def stored(self, name: str, rounding: Rounding) -> QuantizedLayer:
        """With its sparse part, as it goes to a file."""
        dense, target = rounding.quantized()
        if self.subject.schemes[name].activations:
            return dense.pack_w8a8(self.subject.schemes[name])
        if name in self.masks:
            return attach_residual(target, dense, self.masks[name].to(target.device), self.subject.dtype)
        return dense.pack()

    def _at_work(self, tensors: Mapping[str, torch.Tensor], name: str) -> torch.Tensor | None:
        """That of ``name``, where the network is."""
        found = tensors.get(name)
        return None if found is None else found.to(self.subject.network.device)

    def _rounding(self, name: str, task: Task, reached: bool) -> Rounding:
        if self.subject.recipe.activations_of(name).per_tensor:
            return FixedRounding(int8.one_step(task.weight, task.dtype), task.weight, None)
        return BASES[self.subject.recipe.base if reached else "rtn"](task)

    def _reached(self, block: Block, statistics: Mapping[str, InputStatistics], inputs: list[torch.Tensor]) -> set[str]:
        """The layers of ``block`` that calibration says something about. Raises InputError where that is not all of
        them, unless the recipe has an answer."""
        recipe = self.subject.recipe
        if recipe.base not in DATA_FREE:
            found = set(statistics)
        elif self.subject.architecture.experts:
            found = reached(block.module, block.linears, inputs, block.keywords)
        else:
            return set(block.linears)
        if recipe.calibration.unreached == "refuse":
            refuse_unreached(name for name in block.linears if name not in found)
        return found

    def _equalize(self, block: Block, statistics: dict[str, InputStatistics]) -> None:
        """Scales the inputs of the layers as AWQ does; ``statistics`` follow."""
        subject = self.subject
        rewriter = Rewriter.of(subject.network.config, subject.architecture, subject.dtype)
        for pair in rewriter.pairs:
            names = [f"{block.prefix}.{consumer}" for consumer in pair.consumers]
            if pair.through != "norm" and f"{block.prefix}.{pair.producer}" not in subject.schemes:
                continue  # a layer that stays as it was is not scaled either
            weights = [subject.network.get_submodule(name).weight for name in names]
            rows = block.module.get_parameter(f"{pair.producer}.weight").shape[0]
            # AWQ leaves out value heads that several query heads share, and so does this
            if any(name not in statistics for name in names) or rows != weights[0].shape[1]:
                continue
            scale = awq.search_scale(
                weights,
                statistics[names[0]],
                subject.schemes[names[0]].weights,
                dtype=subject.dtype,
                excluded=[self._at_work(self.masks, name) for name in names],
            )
            rewriter.apply(block.module, pair, scale)
            for name in names:
                statistics[name] = statistics[name].rescaled(scale)
