"""The last step of a block: input steps and bias corrections of its quantized layers, in the order in which they run.

Each layer is settled with the inputs that the layers before it, quantized and corrected, produce; what it should have
put out comes from the unquantized block on the unquantized model's inputs. A correction has to lower the error of its
layer, and those of layers that share an input that of the whole model's end (ending.py), both on held-out samples.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import starmap
from typing import Any

import torch
from requant_kernels.layer import QuantizedLayer
from requant_kernels.reference import dequantize
from requant_kernels.scheme import ActivationScheme, LayerScheme
from requant_kernels.w8a8.weight import W8A8Weight
from torch import nn
from torch.nn.functional import linear

from requant.aweq.bias_correction import Correction, computed_from, correction, held_out
from requant.aweq.ending import Ending
from requant.aweq.error import token_weights
from requant.aweq.installed import RoundInput, correct, install
from requant.aweq.observe import inputs_of
from requant.aweq.settings import Activations
from requant.aweq.static_range import static_range
from requant.aweq.trial import Trial
from requant.errors import InputError
from requant.walk import run_block

Batches = Sequence[torch.Tensor]
Layers = dict[str, QuantizedLayer]


@dataclass(frozen=True)
class Note:
    """What was decided for a layer, for the report. All errors are weighed squared ones (error.py).

    static_error, dynamic_error: of the block's output, through rounding the inputs of this layer, and of those that it
    shares them with, alone. switched: it was to be static and became dynamic. corrected: whether its bias correction
    was kept, because it lowers the layer's held-out error from error_without to error_with, and those of the layers
    that share its input together the model's from end_without to end_with.
    """

    static_error: float | None = None
    dynamic_error: float | None = None
    switched: bool = False
    corrected: bool = False
    error_without: float | None = None
    error_with: float | None = None
    end_without: float | None = None
    end_with: float | None = None


@dataclass(frozen=True)
class Side:
    """A block and what enters it, [B, T, C] for each sample."""

    block: nn.Module
    hidden: Batches
    keywords: dict[str, Any]

    def inputs(self, names: Sequence[str]) -> dict[str, list[torch.Tensor]]:
        """Of the layers ``names``: [T, K] for each sample."""
        return inputs_of(self.block, names, self.hidden, self.keywords)


@dataclass(frozen=True)
class Settler:
    """``original``, whose ``outputs`` [B, T, C] are known, is what ``quantized`` should compute; the latter's layers
    hold ordinary weights until they are settled. ``settings``: of each layer, by local name. ``ending``: of the model
    after this block, for the held-out samples; of use to bias correction alone."""

    original: Side
    outputs: Batches
    quantized: Side
    settings: Mapping[str, Activations]
    ending: Ending | None = None

    @torch.no_grad()
    def settle(
        self, stages: Iterable[Sequence[str]], layers: Mapping[str, QuantizedLayer], schemes: Mapping[str, LayerScheme]
    ) -> tuple[Layers, dict[str, Note]]:
        """layers: by local name, without input steps and corrections; returned with those that ``schemes`` ask for, and
        at work in the quantized block.

        stages: layers that are fed one tensor, in the order in which they run. Raises InputError for a layer to be
        static that no calibration token activates.
        """
        weights = token_weights(self.outputs)
        members = [[name for name in stage if name in layers] for stage in stages]
        members = [stage for stage in members if stage]
        corrected = [stage[0] for stage in members if schemes[stage[0]].bias_correction]
        wanted = self.original.inputs(corrected) if corrected else {}
        settled: Layers = {}
        notes: dict[str, Note] = {}
        for stage in members:
            made = {name: layers[name] for name in stage}
            noted = dict.fromkeys(made, Note())
            scheme = schemes[stage[0]]
            needed = scheme.bias_correction or _is_static(scheme)
            inputs = self.quantized.inputs(stage[:1])[stage[0]] if needed else []
            if _is_static(scheme):
                made, note = self._with_input_steps(made, torch.cat(inputs), torch.cat(weights))
                noted = dict.fromkeys(made, note)
            for name, layer in made.items():
                install(self._at_work(name), layer)
            if scheme.bias_correction:
                found = self._corrections(made, inputs, wanted[stage[0]], weights)
                made, noted = self._corrected(made, noted, found)
            settled |= made
            notes |= noted
        return settled, notes

    def _with_input_steps(self, layers: Layers, x: torch.Tensor, weights: torch.Tensor) -> tuple[Layers, Note]:
        """Layers that share their input x [T, K] share its step; where it costs too much, all become dynamic."""
        name, first = next(iter(layers.items()))
        settings = self.settings[name]
        importance = None
        if settings.range == "mse":  # as large as x
            columns = torch.stack([dequantize(layer).square().sum(0) for layer in layers.values()]).sum(0)
            importance = torch.outer(weights, columns)
        try:
            steps = static_range(
                x,
                settings.range,
                symmetric=settings.symmetric,
                dtype=first.dtype,
                weights=importance,
            )
        except ValueError as error:
            raise InputError(f"{name}: {error}; calibrate on more, or other, text") from None
        static, dynamic = (ActivationScheme(way, settings.symmetric) for way in (False, True))
        trial = Trial.of(self.original.block, self.original.hidden, self.outputs, self.original.keywords)
        static_error, dynamic_error = (
            trial.error({}, dict.fromkeys(layers, rounding))
            for rounding in (RoundInput(static, steps.scale, steps.zero_point), RoundInput(dynamic))
        )
        note = Note(static_error, dynamic_error, switched=static_error - dynamic_error > settings.limit)
        made: Layers = {}
        for name, layer in layers.items():
            assert isinstance(layer, W8A8Weight)
            if note.switched:
                made[name] = replace(layer, scheme=replace(layer.scheme, activations=dynamic))
                continue
            zero_point = None if steps.zero_point is None else steps.zero_point.clone()  # each is stored by itself
            made[name] = replace(layer, input_scale=steps.scale.clone(), input_zero_point=zero_point)
        return made, note

    def _corrections(self, layers: Layers, inputs: Batches, wanted: Batches, weights: Batches) -> dict[str, Correction]:
        """inputs, wanted: what enters the quantized and the original layers."""
        samples = list(zip(inputs, wanted, weights, strict=True))
        found = {}
        for name, layer in layers.items():
            original = self.original.block.get_parameter(f"{name}.weight")
            difference = partial(_difference, rounds=RoundInput.of(layer), decoded=dequantize(layer), original=original)
            found[name] = correction(
                starmap(difference, computed_from(samples)), starmap(difference, held_out(samples))
            )
        return found

    def _corrected(
        self, layers: Layers, notes: dict[str, Note], found: Mapping[str, Correction]
    ) -> tuple[Layers, dict[str, Note]]:
        """``layers``, at work without corrections, with those that help put to work."""
        made, noted = _with_corrections(layers, notes, found)
        if not any(one.corrected for one in noted.values()):
            return layers, noted
        without = self._end_error()
        before = {name: self._at_work(name).bias for name in made}
        for name, layer in made.items():
            correct(self._at_work(name), layer)
        with_them = self._end_error()
        kept = with_them < without
        if not kept:
            for name, bias in before.items():
                self._at_work(name).bias = bias
        noted = {
            name: replace(one, corrected=one.corrected and kept, end_without=without, end_with=with_them)
            for name, one in noted.items()
        }
        return made if kept else layers, noted

    def _end_error(self) -> float:
        assert self.ending is not None
        block, keywords = self.quantized.block, self.quantized.keywords
        deciding = held_out(self.quantized.hidden)[: len(self.ending.wanted)]
        return self.ending.error([run_block(block, hidden, keywords) for hidden in deciding])

    def _at_work(self, name: str) -> nn.Linear:
        module = self.quantized.block.get_submodule(name)
        assert isinstance(module, nn.Linear)
        return module


def _difference(
    x: torch.Tensor,
    y: torch.Tensor,
    weights: torch.Tensor,
    *,
    rounds: RoundInput | None,
    decoded: torch.Tensor,
    original: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the quantized layer makes of x minus what the original makes of y, [T, N], and the weights of the tokens."""
    return linear(rounds.round(x) if rounds else x, decoded) - linear(y, original), weights


def _is_static(scheme: LayerScheme) -> bool:
    return scheme.activations is not None and not scheme.activations.dynamic


def _with_corrections(
    layers: Layers, notes: dict[str, Note], found: Mapping[str, Correction]
) -> tuple[Layers, dict[str, Note]]:
    """Corrections that help their layer; beside one that does, layers of the same stage, which may be served as one,
    hold zeros."""
    noted = {
        name: replace(notes[name], corrected=one.helps, error_without=one.error_without, error_with=one.error_with)
        for name, one in found.items()
    }
    if not any(one.helps for one in found.values()):
        return layers, noted
    made: Layers = {}
    for name, layer in layers.items():
        value = found[name].value if found[name].helps else torch.zeros_like(found[name].value)
        scheme = replace(layer.scheme, bias_correction=True)
        made[name] = replace(layer, scheme=scheme, bias_correction=value.to(layer.dtype))
    return made, noted
