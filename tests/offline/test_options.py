"""Options of `requant quantize`: which recipe they make."""

from dataclasses import replace

import pytest
from requant.errors import InputError
from requant.options import recipe_of
from requant.recipe import Recipe, load_recipe
from requant.settings import Calibration, Distillation
from requant_kernels.scheme import WeightScheme


def test_without_options_it_is_the_default():
    assert recipe_of({}) == load_recipe("rtn-w4")


@pytest.mark.parametrize(
    ("method", "bits", "preset"),
    [("requant", 4, "requant-w4"), ("requant", 3, "requant-w3"), ("requant", 2, "requant-w2"), ("rtn", 4, "rtn-w4")],
)
def test_a_method_is_a_preset(method, bits, preset):
    assert recipe_of({"method": method, "bits": bits}) == load_recipe(preset)


def test_a_method_is_of_4_bit_and_reaches_to_8():
    assert recipe_of({"method": "requant"}) == load_recipe("requant-w4")
    wide = recipe_of({"method": "requant", "bits": 8})
    assert wide == replace(load_recipe("requant-w4"), weights=WeightScheme(8, 64, symmetric=False))


def test_options_override():
    given = {"method": "rtn", "base": "gptq", "outliers": "1%", "significant": "0.05%", "ignore": [".*o_proj"]}
    more = {"calibration": "prose.txt", "samples": 8, "seqlen": 128, "seed": 3}
    assert recipe_of(given | more) == Recipe(
        WeightScheme(4, 64, symmetric=False),
        "gptq",
        outliers=0.01,
        significant=0.0005,
        calibration=Calibration("prose.txt", 8, 128),
        ignore=(".*o_proj",),
        seed=3,
    )


def test_another_base_takes_what_belongs_to_it():
    kmeans = recipe_of({"method": "requant", "bits": 3, "base": "kmeans"})
    assert kmeans.weights == WeightScheme(3, codebook=True)
    assert kmeans.distillation == load_recipe("requant-w3").distillation
    assert recipe_of({"recipe": "paper-squeezellm", "base": "gptq"}).weights == WeightScheme(4, 64, symmetric=False)


def test_distillation_is_the_presets_unless_told_or_in_the_way():
    two = {"method": "requant", "bits": 2}
    assert recipe_of(two).distillation.steps == 64
    assert recipe_of(two | {"distillation": 5}).distillation == Distillation(5)
    assert not recipe_of(two | {"distillation": 0}).distillation.steps
    assert not recipe_of(two | {"base": "gptq", "bias_correction": True}).distillation.steps


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"significant": "30%"}, "significant 30.00% is outside"),
        ({"samples": 1}, "samples 1 is not a whole number of at least 2"),
        ({"seqlen": 3}, "seqlen 3 is not a whole number of at least 16"),
    ],
)
def test_numbers_out_of_range(given, message):
    with pytest.raises(InputError, match=message):
        recipe_of(given)


def test_target_bits_start_from_the_preset_below_them():
    assert recipe_of({"target_bits": 3.5}) == replace(load_recipe("requant-w3"), target_bits=3.5)
    assert recipe_of({"target_bits": 1.9, "mixed": True}).weights.bits == 2
    with pytest.raises(InputError, match="mixed needs target_bits"):
        recipe_of({"mixed": True})
    for bits in (0.5, float("nan"), float("inf")):
        with pytest.raises(InputError, match=rf"target_bits {bits} is not a number from 1 to 16"):
            recipe_of({"target_bits": bits})


@pytest.mark.parametrize("share", ["outliers", "significant"])
def test_a_share_beside_target_bits_is_refused(share):
    with pytest.raises(InputError, match=f"--{share}: with target bits the share follows from them"):
        recipe_of({"target_bits": 3.5, share: "0.1%"})


def test_a_preset_and_a_grid_go_with_target_bits():
    """The grid is where the path of the sensitivities ends."""
    found = recipe_of({"target_bits": 3.5, "bits": 2, "group_size": 32})
    assert found == replace(load_recipe("requant-w2"), target_bits=3.5, weights=WeightScheme(2, 32, symmetric=False))


@pytest.mark.parametrize(
    "given",
    [
        {"calibration": "prose.txt"},
        {"samples": 8},
        {"seqlen": 64},
        {"unreached": "rtn"},
        {"offload_folder": "scratch"},
        {"resume": True},
    ],
    ids=lambda given: next(iter(given)),
)
def test_what_is_of_calibration_is_refused_without_it(given):
    name = next(iter(given)).replace("_", "-")
    with pytest.raises(InputError, match=f"--{name}: this recipe takes no calibration text; leave it out"):
        recipe_of(given | {"method": "rtn", "outliers": "0.5%"})
    recipe_of(given | {"method": "rtn", "significant": "0.5%"})
    recipe_of({"resume": False})  # the command's own default
