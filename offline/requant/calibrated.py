"""Calibrated quantization of a model in memory: choose the sparse entries, quantize block by block around them, then
train what is still free through the whole model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from requant_kernels.layer import QuantizedLayer
from requant_kernels.rounding import rtn
from requant_kernels.rounding.dense import attach_residual
from requant_kernels.scheme import LayerScheme, WeightScheme
from torch import nn
from transformers import PreTrainedModel

from requant import models
from requant.aweq import int8
from requant.aweq.rewrite import Rewriter
from requant.aweq.settle import Side
from requant.aweq.steps import Steps
from requant.calibration import Windows
from requant.detach import significant
from requant.detach.choice import Budget, choose
from requant.progress import track
from requant.quantizers import awq, clip, kept, kmeans
from requant.quantizers.bases import BASES, FixedRounding, Rounding, Task
from requant.quantizers.learned import LearnedRounding
from requant.quantizers.rescaled import Rescaled
from requant.recipe import Recipe
from requant.sensitivity.measure import Sensitivity
from requant.sensitivity.pqi import Completeness, Path
from requant.sensitivity.quadrature import nodes
from requant.sensitivity.selection import mask_of
from requant.sensitivity.store import Stores, TensorStore
from requant.settings import DATA_FREE, EQUALIZED, FISHER
from requant.stages import CHOICE, Result, Stages
from requant.statistics import InputStatistics, collect, reached, refuse_unreached
from requant.targeting import fit
from requant.tuning.attach import trainable
from requant.tuning.blockwise import train_block
from requant.tuning.distillation import distill, final_state
from requant.walk import block_calls, run_block

Samples = Sequence[torch.Tensor]
Masks = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Calibrated:
    """layers: by full name, ready to be stored. integrals: how complete each path integral was. divergences: from the
    original's predictions at each step of distillation, nats per token. windows: what all this was measured on.
    decisions: of AWEQ, by the name of a layer or a norm. unreached: layers of experts that no token was routed to:
    rounded to nearest."""

    windows: Windows
    layers: dict[str, QuantizedLayer]
    integrals: list[Completeness]
    divergences: list[float]
    decisions: dict[str, dict[str, Any]]
    unreached: list[str]

    def summary(self) -> dict[str, Any]:
        """For the report: what was read, how complete the path integrals were, what distillation gained."""
        found: dict[str, Any] = {
            "text": self.windows.text,
            "sha256": self.windows.sha256,
            "tokens": sum(ids.numel() for ids in self.windows.ids),
        }
        if self.integrals:
            found["integrals"] = [asdict(one) | {"error_percent": round(100 * one.error, 4)} for one in self.integrals]
        if self.divergences:
            tenth = max(1, len(self.divergences) // 10)
            found["divergence"] = {
                "first": self.divergences[0],
                "last": sum(self.divergences[-tenth:]) / tenth,
            }
        if self.decisions:
            found["decisions"] = self.decisions
        if self.unreached:
            found["unreached"] = self.unreached
        return found


@dataclass(frozen=True)
class _Block:
    """One decoder block at work: its name, itself, its layers to quantize, how the model calls it."""

    prefix: str
    module: nn.Module
    linears: dict[str, nn.Linear]
    keywords: dict[str, Any]

    def run(self, hidden: torch.Tensor) -> torch.Tensor:
        return run_block(self.module, hidden, self.keywords)


@dataclass(frozen=True)
class CalibratedRun:
    """``network`` computes in fp32 and is stored in ``dtype``; ``schemes``: the layers to quantize, by full name.

    The network may be rewritten (AWQ, AWEQ) into another that is the same function; all else stays. ``stages`` keeps
    what is finished: the choice of sparse entries, and each block. ``stores`` hold what else is as large as the model:
    gradients, both ends of their path, the optimizer's moments.
    """

    network: PreTrainedModel
    architecture: models.Architecture
    schemes: Mapping[str, LayerScheme]
    recipe: Recipe
    dtype: torch.dtype
    stages: Stages = field(default_factory=Stages)
    stores: Stores = TensorStore

    def quantize(self, windows: Windows) -> Calibrated:
        """Raises InputError for a layer that no token reaches, and ValueError where a loss is not finite."""
        samples = [ids.to(self.network.device) for ids in windows.ids]
        self.network.requires_grad_(False)
        masks, facts = self.stages.kept(CHOICE, partial(self._chosen, samples))
        integrals = [Completeness(**one) for one in facts["integrals"]]
        schemes = {name: LayerScheme.from_dict(one) for name, one in facts["schemes"].items()}
        return replace(self, schemes=schemes)._around(masks, integrals, windows, samples)

    def _chosen(self, samples: Samples) -> Result:
        """Masks, how complete the integrals behind them were, and the schemes they are meant for."""
        schemes = self.schemes
        if self.recipe.target_bits is None:
            masks, integrals = self._sparse_entries(samples)
        else:
            masks, integrals, schemes = self._within(self.recipe.target_bits, samples)
        facts = {"integrals": [asdict(one) for one in integrals]}
        return masks, facts | {"schemes": {name: scheme.to_dict() for name, scheme in schemes.items()}}

    def _within(self, bits: float, samples: Samples) -> tuple[Masks, list[Completeness], Mapping[str, LayerScheme]]:
        """As many true bits a weight and no more."""
        path = self._path(rounded=True)
        measured = Sensitivity.of(self.recipe.selection).measure(path, samples)
        integrals = [measured.completeness(samples)] if measured.criterion.rule == "path" else []
        units = models.shared_schemes(self.network, self.architecture) if self.recipe.mixed else [list(self.schemes)]
        fitted = fit(
            measured,
            [unit for unit in units if unit[0] in self.schemes],
            bits,
            like=self.recipe.weights,
            value_bits=8 * self.dtype.itemsize,
            rounded=self._nearest,
            settled=self._searched,
        )
        path.move_to(0.0)
        return fitted.masks, integrals, fitted.schemes

    def _around(self, masks: Masks, integrals: list[Completeness], windows: Windows, samples: Samples) -> Calibrated:
        """Quantizes what ``masks`` leave."""
        importance = self._fisher(samples) if self.recipe.base in FISHER else {}
        teacher = self._teacher(samples)
        steps = Steps(self.recipe, self.architecture, self.schemes, self.network.config, self.dtype)
        roundings, settled, unreached = self._blocks(samples, masks, importance, steps)
        divergences = self._distilled(roundings, list(zip(samples, teacher, strict=False)))
        if self.recipe.selection.restore and self.recipe.significant:
            integrals = integrals + self._restore(roundings, masks, samples)
        layers = settled | {name: self._stored(name, rounding, masks) for name, rounding in roundings.items()}
        return Calibrated(windows, layers, integrals, divergences, steps.report(), unreached)

    @property
    def _linears(self) -> dict[str, nn.Linear]:
        found = models.linears(self.network, self.architecture)
        return {name: linear for name, linear in found.items() if name in self.schemes}

    def _path(self, rounded: bool) -> Path:
        """From the weights of the layers with a sparse part to their first quantization, on searched ranges, or from
        all to themselves."""
        linears = {name: one for name, one in self._linears.items() if self.schemes[name].sparse or not rounded}
        parameters = {name: linear.get_parameter("weight") for name, linear in linears.items()}
        start, end = self.stores(), self.stores()
        for name, weight in parameters.items():
            start.copy(name, weight.detach())
            if rounded:
                end.copy(name, self._first_rounded(name, weight.detach(), None))
        blocks = [block for _, block in models.blocks(self.network, self.architecture)]
        return Path(blocks, parameters, self._loss, start, end if rounded else start, self.stores)

    def _loss(self, ids: torch.Tensor) -> torch.Tensor:
        return self.network(input_ids=ids, labels=ids, use_cache=False).loss

    def _first_rounded(self, name: str, weight: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        decoded = self._searched(weight, self.schemes[name].weights, mask)
        return decoded if mask is None else torch.where(mask, weight, decoded)

    def _searched(self, weight: torch.Tensor, scheme: WeightScheme, mask: torch.Tensor | None = None) -> torch.Tensor:
        quantize = kmeans.quantize if scheme.codebook else clip.quantize
        return quantize(weight, scheme, dtype=self.dtype, excluded=mask).dequantize()

    def _nearest(self, weight: torch.Tensor, scheme: WeightScheme) -> torch.Tensor:
        """What many candidate schemes are compared by: without the search of ranges, which costs twentyfold."""
        quantize = kmeans.quantize if scheme.codebook else rtn.quantize
        return quantize(weight, scheme, dtype=self.dtype).dequantize()

    def _sparse_entries(self, samples: Samples) -> tuple[Masks, list[Completeness]]:
        budget = Budget(self.recipe.outliers, 0.0 if self.recipe.selection.restore else self.recipe.significant)
        if not budget.outliers and not budget.significant:
            return {}, []
        path, seed = self._path(rounded=True), self.recipe.seed
        return choose(path, samples, budget, self.recipe.selection, self._first_rounded, seed=seed)

    def _fisher(self, samples: Samples) -> Mapping[str, torch.Tensor]:
        return self._path(rounded=False).gradients(samples, nodes("start", 1), second_moment=True).square

    def _teacher(self, samples: Samples) -> list[torch.Tensor]:
        if not self.recipe.distillation.steps:
            return []
        with torch.no_grad():
            return [final_state(self.network, ids) for ids in track(samples, len(samples), "original's predictions")]

    @torch.no_grad()
    def _blocks(
        self, samples: Samples, masks: Masks, importance: Mapping[str, torch.Tensor], steps: Steps
    ) -> tuple[dict[str, Rounding], dict[str, QuantizedLayer], list[str]]:
        """Each block is quantized for the inputs that the quantized blocks before it produce. Returns what may still be
        trained, what is settled for good, and which layers no token reaches."""
        blocks = list(models.blocks(self.network, self.architecture))
        calls = block_calls(self.network, [block for _, block in blocks], samples)
        inputs, originals = list(calls.hidden), calls.hidden
        roundings, settled, unreached = dict[str, Rounding](), dict[str, QuantizedLayer](), list[str]()
        for index, (prefix, module) in track(enumerate(blocks), len(blocks), "quantizing blocks"):
            linears = {name: linear for name, linear in self._linears.items() if name.startswith(f"{prefix}.")}
            block = _Block(prefix, module, linears, calls.keywords[index])
            original = Side(module, originals, block.keywords)
            originals = steps.equalize(prefix, original)
            if self.recipe.settled:
                rounded, missed = self._rounded(block, inputs, masks, importance)
                unreached += missed
                layers = {name: self._stored(name, rounding, masks) for name, rounding in rounded.items()}
                layers, inputs = steps.settle(prefix, layers, original, originals, inputs)
                settled |= layers
                continue
            pairs = list(zip(inputs, originals, strict=True))
            tensors, facts = self.stages.kept(prefix, partial(self._finished, block, pairs, masks, importance))
            unreached += facts["unreached"]
            made = self._put_back(block, tensors, masks)
            with trainable(linears, made):
                inputs = [block.run(hidden) for hidden in inputs]
            roundings |= made
        return roundings, settled, unreached

    def _rounding(self, name: str, task: Task, reached: bool) -> Rounding:
        if self.recipe.activations_of(name).per_tensor:
            return FixedRounding(int8.one_step(task.weight, task.dtype), task.weight, None)
        return BASES[self.recipe.base if reached else "rtn"](task)

    def _reached(
        self, block: _Block, statistics: Mapping[str, InputStatistics], inputs: list[torch.Tensor]
    ) -> set[str]:
        """The layers of ``block`` that calibration says something about. Raises InputError where that is not all of
        them, unless the recipe has an answer."""
        if self.recipe.base not in DATA_FREE:
            found = set(statistics)
        elif self.architecture.experts:
            found = reached(block.module, block.linears, inputs, block.keywords)
        else:
            return set(block.linears)
        if self.recipe.calibration.unreached == "refuse":
            refuse_unreached(name for name in block.linears if name not in found)
        return found

    def _rounded(
        self, block: _Block, inputs: list[torch.Tensor], masks: Masks, importance: Mapping[str, torch.Tensor]
    ) -> tuple[dict[str, Rounding], list[str]]:
        """One block's layers on their base, before any training; and those of them that no token reaches."""
        statistics: dict[str, InputStatistics] = {}
        if self.recipe.base not in DATA_FREE:
            statistics = collect(block.module, block.linears, inputs, block.keywords)
        found = self._reached(block, statistics, inputs)
        if self.recipe.base in EQUALIZED:
            self._equalize(block.prefix, block.module, statistics, masks)
        made = {
            name: self._rounding(
                name,
                Task(
                    linear.weight.detach(),
                    self.schemes[name].weights,
                    self.dtype,
                    statistics.get(name),
                    masks.get(name),
                    importance.get(name),
                ),
                name in found,
            )
            for name, linear in block.linears.items()
        }
        return made, [name for name in made if name not in found]

    def _finished(
        self,
        block: _Block,
        pairs: list[tuple[torch.Tensor, torch.Tensor]],
        masks: Masks,
        importance: Mapping[str, torch.Tensor],
    ) -> Result:
        """One block, quantized so that the inputs of ``pairs`` give their outputs, taken apart for keeping."""
        made, unreached = self._rounded(block, [hidden for hidden, _ in pairs], masks, importance)
        with trainable(block.linears, made):
            self._train(block.run, made, pairs)
        tensors = {f"{name}|{part}": t for name, one in made.items() for part, t in kept.tensors_of(one).items()}
        if self.recipe.base in EQUALIZED:
            tensors |= {f"|{name}": parameter for name, parameter in block.module.named_parameters()}
        return tensors, {"unreached": unreached}

    def _put_back(self, block: _Block, tensors: Mapping[str, torch.Tensor], masks: Masks) -> dict[str, Rounding]:
        parts: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in tensors.items():
            name, part = key.split("|")
            parts.setdefault(name, {})[part] = tensor.to(self.network.device)
        for name, tensor in parts.get("", {}).items():
            block.module.get_parameter(name).copy_(tensor)
        return {
            name: kept.rebuilt(parts[name], self.schemes[name].weights, self.dtype, masks.get(name))
            for name in block.linears
        }

    def _equalize(self, prefix: str, block: nn.Module, statistics: dict[str, InputStatistics], masks: Masks) -> None:
        """Scales the inputs of ``block``'s layers as AWQ does; ``statistics`` follow."""
        rewriter = Rewriter.of(self.network.config, self.architecture, self.dtype)
        for pair in rewriter.pairs:
            names = [f"{prefix}.{consumer}" for consumer in pair.consumers]
            weights = [self.network.get_submodule(name).weight for name in names]
            rows = block.get_parameter(f"{pair.producer}.weight").shape[0]
            # AWQ leaves out value heads that several query heads share, and so does this
            if any(name not in statistics for name in names) or rows != weights[0].shape[1]:
                continue
            scale = awq.search_scale(
                weights,
                statistics[names[0]],
                self.schemes[names[0]].weights,
                dtype=self.dtype,
                excluded=[masks.get(name) for name in names],
            )
            rewriter.apply(block, pair, scale)
            for name in names:
                statistics[name] = statistics[name].rescaled(scale)

    @torch.enable_grad()
    def _train(
        self,
        run: Callable[[torch.Tensor], torch.Tensor],
        made: Mapping[str, Rounding],
        samples: list[tuple[torch.Tensor, torch.Tensor]],
    ) -> None:
        learned = [rounding for rounding in made.values() if isinstance(rounding, LearnedRounding)]
        if learned:
            train_block(run, learned, samples, self.recipe.training, self.recipe.seed)

    def _distilled(
        self, roundings: dict[str, Rounding], samples: list[tuple[torch.Tensor, torch.Tensor]]
    ) -> list[float]:
        """With a rate of offsets it trains learned roundings, without one the steps of what any base has rounded."""
        settings = self.recipe.distillation
        if not settings.steps:
            return []
        if not settings.rate:
            for name, rounding in roundings.items():
                roundings[name] = Rescaled(*rounding.quantized(), rounding.excluded)
        trained = {name: one for name, one in roundings.items() if isinstance(one, LearnedRounding | Rescaled)}
        blocks = [block for _, block in models.blocks(self.network, self.architecture)]
        with trainable(self._linears, roundings):
            return distill(self.network, blocks, trained, samples, settings, seed=self.recipe.seed, stores=self.stores)

    def _restore(self, roundings: dict[str, Rounding], masks: Masks, samples: Samples) -> list[Completeness]:
        """Gives the significant weights of what is quantized already their value back; extends ``masks``."""
        made = {name: rounding.quantized() for name, rounding in roundings.items()}
        path = self._path(rounded=False)
        path = replace(path, end={name: roundings[name]().detach().clone() for name in path.start})
        numel = sum(weight.numel() for weight in path.start.values())
        found = significant.select(
            path,
            samples,
            Sensitivity.of(self.recipe.selection, seed=self.recipe.seed),
            round(self.recipe.significant * numel),
            steps=self.recipe.selection.steps,
            per_matrix=self.recipe.selection.per_matrix,
            taken={name: mask.flatten().nonzero().flatten() for name, mask in masks.items()} or None,
        )
        path.move_to(0.0)
        for name, index in found.indices.items():
            dense, target = made[name]
            restored = mask_of(index, target.shape)
            masks[name] = masks[name] | restored if name in masks else restored
            roundings[name] = FixedRounding(dense, torch.where(restored, path.start[name], target), masks[name])
        return found.completeness

    def _stored(self, name: str, rounding: Rounding, masks: Masks) -> QuantizedLayer:
        dense, target = rounding.quantized()
        if self.schemes[name].activations:
            return dense.pack_w8a8(self.schemes[name])
        return attach_residual(target, dense, masks[name], self.dtype) if name in masks else dense.pack()
