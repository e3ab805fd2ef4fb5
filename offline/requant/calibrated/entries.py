"""Which entries of a model go to the sparse part: before anything is quantized, or, as in the paper, afterwards."""

from collections.abc import Mapping
from dataclasses import asdict, replace

import torch
from requant_kernels.scheme import LayerScheme

from requant import models
from requant.calibrated.subject import Masks, Samples, Subject
from requant.detach import significant
from requant.detach.choice import Budget, by_weights, choose
from requant.quantizers.bases import FixedRounding, Rounding
from requant.sensitivity.measure import Sensitivity
from requant.sensitivity.pqi import Completeness
from requant.sensitivity.selection import mask_of
from requant.stages import Result
from requant.targeting import check_target, fit, shapes_of


def choice(subject: Subject, samples: Samples) -> Result:
    """Masks, how complete the integrals behind them were, and the schemes they are meant for."""
    schemes = subject.schemes
    if subject.recipe.target_bits is None:
        masks, integrals = _of_given_shares(subject, samples)
    else:
        masks, integrals, schemes = _within(subject, subject.recipe.target_bits, samples)
    facts = {"integrals": [asdict(one) for one in integrals]}
    return masks, facts | {"schemes": {name: scheme.to_dict() for name, scheme in schemes.items()}}


def _of_given_shares(subject: Subject, samples: Samples) -> tuple[Masks, list[Completeness]]:
    recipe = subject.recipe
    budget = Budget(recipe.outliers, 0.0 if recipe.selection.restore else recipe.significant)
    if not budget.outliers and not budget.significant:
        return {}, []
    if not budget.significant and recipe.selection.rule != "adaptive":
        return by_weights(subject.sparse_weights, budget.outliers, recipe.selection.rule), []
    path = subject.path(rounded=True)
    return choose(path, samples, budget, recipe.selection, subject.first_rounded, seed=recipe.seed)


def _within(
    subject: Subject, bits: float, samples: Samples
) -> tuple[Masks, list[Completeness], Mapping[str, LayerScheme]]:
    """As many true bits a weight and no more."""
    recipe, value_bits = subject.recipe, 8 * subject.dtype.itemsize
    shared = models.shared_schemes(subject.network, subject.architecture) if recipe.mixed else [list(subject.schemes)]
    units = [unit for unit in shared if unit[0] in subject.schemes]
    check_target(shapes_of(subject.sparse_weights), units, bits, like=recipe.weights, value_bits=value_bits)
    path = subject.path(rounded=True)
    measured = Sensitivity.of(recipe.selection).measure(path, samples)
    integrals = [measured.completeness(samples)] if measured.criterion.rule == "path" else []
    fitted = fit(
        measured,
        units,
        bits,
        like=recipe.weights,
        value_bits=value_bits,
        rounded=subject.nearest,
        settled=subject.searched,
    )
    path.move_to(0.0)
    return fitted.masks, integrals, fitted.schemes


def restore(subject: Subject, roundings: dict[str, Rounding], masks: Masks, samples: Samples) -> list[Completeness]:
    """Gives the significant weights of what is quantized already their value back; extends ``masks``."""
    recipe = subject.recipe
    made = {name: rounding.quantized() for name, rounding in roundings.items()}
    path = subject.path(rounded=False)
    end = subject.stores()
    for name in path.start:
        end.copy(name, roundings[name]().detach())
    path = replace(path, end=end)
    numel = sum(weight.numel() for weight in path.start.values())
    found = significant.select(
        path,
        samples,
        Sensitivity.of(recipe.selection, seed=recipe.seed),
        round(recipe.significant * numel),
        steps=recipe.selection.steps,
        per_matrix=recipe.selection.per_matrix,
        taken={name: mask.flatten().nonzero().flatten() for name, mask in masks.items()} or None,
    )
    path.move_to(0.0)
    for name, index in found.indices.items():
        dense, target = made[name]
        restored = mask_of(index, target.shape)
        masks[name] = masks[name] | restored if name in masks else restored
        at = target.device
        target = torch.where(restored.to(at), path.start[name].to(at), target)
        roundings[name] = FixedRounding(dense, target, masks[name].to(at))
    return found.completeness
