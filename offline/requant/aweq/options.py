"""AWEQ's options of the command line: what they change in a recipe, and which preset they start from."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from requant.recipe import Recipe


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
        found["activations"] = replace(recipe.activations, mode=given["activations"])
    ranges = {name: given[option] for option, name in (("equalize", "range"), ("alpha", "alpha")) if option in given}
    if ranges:
        found["equalization"] = replace(recipe.equalization, **ranges)
    if "bias_correction" in given:
        found["bias_correction"] = given["bias_correction"]
    return found
