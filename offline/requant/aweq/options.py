"""AWEQ's options of the command line: what they change in a recipe, and which preset they start from."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from requant.aweq.settings import Mode
from requant.errors import InputError
from requant.recipe import Override, Recipe


def preset(given: Mapping[str, Any]) -> str | None:
    """For --method aweq, whose own is W8A8, and for --activations alone; None where neither is ``given``."""
    if given.get("method") == "aweq":
        if given.get("bits", 8) != 8 or given.get("activations") == "none":
            return "aweq-w4"
        return "aweq-w8a8-static" if given.get("activations") == "static" else "aweq-w8a8"
    return "rtn-w8a8" if given.get("activations", "none") != "none" else None


def changes(recipe: Recipe, given: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of ``recipe``. Keys of ``given`` are the names of options; those that were not given are absent."""
    found: dict[str, Any] = {}
    if "activations" in given:
        mode = given["activations"]
        found["activations"] = recipe.activations.with_mode(mode)
        found["overrides"] = {pattern: _with_mode(one, mode) for pattern, one in recipe.overrides.items()}
    ranges = {name: given[option] for option, name in (("equalize", "range"), ("alpha", "alpha")) if option in given}
    if ranges:
        found["equalization"] = replace(recipe.equalization, **ranges)
        if "alpha" in given and not found["equalization"].wanted:
            raise InputError("--alpha: nothing is equalized; add --equalize minmax or absmax, or leave it out")
    if "bias_correction" in given:
        found["bias_correction"] = given["bias_correction"]
    if given.get("bias_correction") or given.get("activations", "none") != "none":
        found["distillation"] = replace(recipe.distillation, steps=0)  # which knows nothing of either
    return found


def _with_mode(override: Override, mode: Mode) -> Override:
    """Layers whose inputs the recipe leaves alone stay so; weights stay as they are in any case."""
    return (
        replace(override, activations=override.activations.with_mode(mode)) if override.activations.scheme else override
    )
