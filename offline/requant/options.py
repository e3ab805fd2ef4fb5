"""Options of the command line over a recipe: what each means, and what follows from it."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from requant_kernels.scheme import WeightScheme

from requant.aweq import options as aweq
from requant.errors import InputError
from requant.recipe import Recipe, load_recipe, parse_ratio
from requant.settings import CODEBOOK, TRAINED

METHODS = ("requant", "aweq", "rtn")
BITS = 4  # of a method without --bits
SHARES = ("outliers", "significant")
OF_CALIBRATION = ("calibration", "samples", "seqlen", "unreached", "offload_folder", "resume")


def recipe_of(given: Mapping[str, Any]) -> Recipe:
    """The recipe named, or the preset of the method, with what the other options in ``given`` say otherwise.

    Keys are the names of options; those that were not given are absent. Raises InputError, SchemeError.
    """
    method = given.get("method", "requant" if "target_bits" in given else "rtn")
    target = given.get("target_bits", BITS)
    bits = given.get("bits", max(2, int(target)) if target < 16 else BITS)  # what is out of range, the recipe refuses
    preset = (None if method == "requant" else aweq.preset(given)) or _preset(method, bits)
    recipe = load_recipe(given.get("recipe", preset))
    base = given.get("base", recipe.base)
    changes: dict[str, Any] = {"base": base, "weights": _weights(recipe, base, given)}
    if recipe.distillation.rate and base not in TRAINED:
        changes["distillation"] = replace(recipe.distillation, rate=0.0)
    changes |= {name: parse_ratio(given[name]) for name in SHARES if name in given}
    if "ignore" in given:
        changes["ignore"] = (*recipe.ignore, *given["ignore"])
    changes |= {name: given[name] for name in ("target_bits", "mixed", "quantize_lm_head", "seed") if name in given}
    changes |= aweq.changes(recipe, given)
    if "distillation" in given:
        changes["distillation"] = replace(changes.get("distillation", recipe.distillation), steps=given["distillation"])
    calibration = {name: given[name] for name in ("samples", "seqlen", "unreached") if name in given}
    if "calibration" in given:
        calibration["text"] = given["calibration"]
    made = replace(recipe, calibration=replace(recipe.calibration, **calibration), **changes)
    _refuse_unused(made, given)
    return made


def _refuse_unused(recipe: Recipe, given: Mapping[str, Any]) -> None:
    """``recipe``: what all of ``given`` makes."""
    if recipe.target_bits is not None:
        for name in (one for one in SHARES if one in given):
            raise InputError(f"--{name}: with target bits the share follows from them; leave one of the two out")
    if not recipe.calibrated:
        for name in (one for one in OF_CALIBRATION if given.get(one)):
            option = name.replace("_", "-")
            raise InputError(f"--{option}: this recipe takes no calibration text; leave it out, or choose another base")


def _preset(method: str, bits: int) -> str:
    if method == "requant":
        return f"requant-w{min(bits, 4)}"
    return f"{method}-w4"


def _weights(recipe: Recipe, base: str, given: Mapping[str, Any]) -> WeightScheme:
    """A base with codebooks has no steps, and the other way round."""
    changes = {name: given[name] for name in ("bits", "group_size", "symmetric") if name in given}
    codebook = base in CODEBOOK
    if codebook != recipe.weights.codebook:
        grid = {"group_size": -1, "symmetric": True} if codebook else {"group_size": 64, "symmetric": False}
        changes = {**grid, **changes, "codebook": codebook}
    return replace(recipe.weights, **changes)
