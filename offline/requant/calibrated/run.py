"""A whole run: choose the sparse entries, quantize block by block around them, then train what is still free through
the whole model."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from requant_kernels.layer import QuantizedLayer
from requant_kernels.scheme import LayerScheme
from torch.nn.utils import parametrize

from requant import models
from requant.aweq.bias_correction import held_out
from requant.aweq.ending import Ending
from requant.aweq.settle import Side
from requant.aweq.steps import Steps
from requant.calibrated import entries
from requant.calibrated.block import Block, BlockRounding, Pairs
from requant.calibrated.subject import Masks, Samples, Subject
from requant.calibration import Windows
from requant.progress import track
from requant.quantizers.bases import Rounding
from requant.quantizers.learned import LearnedRounding
from requant.quantizers.rescaled import Rescaled
from requant.sensitivity.pqi import Completeness
from requant.sensitivity.quadrature import nodes
from requant.settings import FISHER
from requant.stages import CHOICE, Stages
from requant.tuning.attach import trainable
from requant.tuning.distillation import Gain, Lessons, distill, draws, final_state
from requant.walk import block_calls


@dataclass(frozen=True)
class Calibrated:
    """layers: by full name, ready to be stored. integrals: how complete each path integral was. gain: of
    distillation. windows: what all this was measured on. decisions: of AWEQ, by the name of a layer or a norm.
    unreached: layers of experts that no token was routed to: rounded to nearest."""

    windows: Windows
    layers: dict[str, QuantizedLayer]
    integrals: list[Completeness]
    gain: Gain | None
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
            found["integrals"] = [one.to_dict() for one in self.integrals]
        if self.gain:
            found["divergence"] = self.gain.to_dict()
        if self.decisions:
            found["decisions"] = self.decisions
        if self.unreached:
            found["unreached"] = self.unreached
        return found


@dataclass(frozen=True)
class CalibratedRun:
    """``stages`` keeps what is finished: the choice of sparse entries, and each block."""

    subject: Subject
    stages: Stages = field(default_factory=Stages)

    def quantize(self, windows: Windows) -> Calibrated:
        """Raises InputError for a layer that no token reaches, and ValueError where a loss is not finite."""
        samples = [ids.to(self.subject.network.device) for ids in windows.ids]
        self.subject.network.requires_grad_(False)
        masks, facts = self.stages.kept(CHOICE, partial(entries.choice, self.subject, samples))
        integrals = [Completeness(**one) for one in facts["integrals"]]
        schemes = {name: LayerScheme.from_dict(one) for name, one in facts["schemes"].items()}
        fitted = replace(self, subject=replace(self.subject, schemes=schemes))
        return fitted._around(masks, integrals, windows, samples)

    def _around(self, masks: Masks, integrals: list[Completeness], windows: Windows, samples: Samples) -> Calibrated:
        """Quantizes what ``masks`` leave."""
        subject, recipe = self.subject, self.subject.recipe
        rounding = BlockRounding(subject, masks, self._fisher(samples) if recipe.base in FISHER else {})
        lessons = self._lessons(windows)
        steps = Steps(recipe, subject.architecture, subject.schemes, subject.network.config, subject.dtype)
        roundings, settled, unreached = self._blocks(samples, rounding, steps)
        gain = self._distilled(roundings, lessons)
        if recipe.restores:
            integrals = integrals + entries.restore(subject, roundings, masks, samples)
        layers = settled | {name: rounding.stored(name, one) for name, one in roundings.items()}
        return Calibrated(windows, layers, integrals, gain, steps.report(), unreached)

    def _fisher(self, samples: Samples) -> Mapping[str, torch.Tensor]:
        return self.subject.path(rounded=False).gradients(samples, nodes("start", 1), second_moment=True).square

    @torch.no_grad()
    def _lessons(self, windows: Windows) -> Lessons | None:
        """What distillation, if there is to be any, goes through: windows, each with its final state in the network as
        it is."""
        recipe, network = self.subject.recipe, self.subject.network
        if not recipe.distillation.steps:
            return None
        drawn = draws(len(windows.slots), recipe.distillation.steps * recipe.distillation.batch, recipe.seed)
        slots = list(dict.fromkeys(chain(*drawn)))
        lessons = {
            slot: (windows.slots[slot], final_state(network, windows.slots[slot].to(network.device)).cpu())
            for slot in track(slots, len(slots), "original's predictions")
        }
        return Lessons(*([lessons[slot] for slot in part] for part in drawn))

    @torch.no_grad()
    def _blocks(
        self, samples: Samples, rounding: BlockRounding, steps: Steps
    ) -> tuple[dict[str, Rounding], dict[str, QuantizedLayer], list[str]]:
        """Each block is quantized for the inputs that the quantized blocks before it produce. Returns what may still be
        trained, what is settled for good, and which layers no token reaches."""
        subject = self.subject
        blocks = list(models.blocks(subject.network, subject.architecture))
        calls = block_calls(subject.network, [block for _, block in blocks], samples)
        inputs, originals = list(calls.hidden), calls.hidden
        ending = None
        if subject.recipe.bias_correction:
            ending = Ending.of([block for _, block in blocks], calls.keywords, held_out(originals))
        roundings, settled, unreached = dict[str, Rounding](), dict[str, QuantizedLayer](), list[str]()
        for index, (prefix, module) in track(enumerate(blocks), len(blocks), "quantizing blocks"):
            linears = {name: linear for name, linear in subject.linears.items() if name.startswith(f"{prefix}.")}
            block = Block(prefix, module, linears, calls.keywords[index])
            original = Side(module, originals, block.keywords)
            originals = steps.equalize(prefix, original)
            if subject.recipe.settled:
                rounded, missed = rounding.rounded(block, inputs)
                unreached += missed
                layers = {name: rounding.stored(name, one) for name, one in rounded.items()}
                rest = ending and ending.after(index + 1)
                layers, inputs = steps.settle(prefix, layers, original, originals, inputs, ending=rest)
                settled |= layers
                continue
            pairs: Pairs = list(zip(inputs, originals, strict=True))
            tensors, facts = self.stages.kept(prefix, partial(rounding.trained, block, pairs))
            unreached += facts["unreached"]
            made = rounding.put_back(block, tensors)
            with trainable(linears, made), parametrize.cached():  # a layer is decoded once, not for every sample
                inputs = [block.run(hidden) for hidden in inputs]
            if subject.recipe.distillation.levels_alone:  # now: a learned rounding holds five numbers a weight
                made = {name: Rescaled(*one.quantized(), one.excluded) for name, one in made.items()}
            if subject.recipe.distillation.steps or subject.recipe.restores:
                roundings |= made
            else:
                settled |= {name: rounding.stored(name, one).to("cpu") for name, one in made.items()}
        return roundings, settled, unreached

    def _distilled(self, roundings: dict[str, Rounding], lessons: Lessons | None) -> Gain | None:
        if not lessons:
            return None
        subject, settings = self.subject, self.subject.recipe.distillation
        trained = {name: one for name, one in roundings.items() if isinstance(one, LearnedRounding | Rescaled)}
        with trainable(subject.linears, roundings):
            return distill(subject.network, subject.blocks, trained, lessons, settings, stores=subject.stores)
