"""Recipes: what is shipped loads, what is wrong is refused by name."""

import pytest
from requant.errors import InputError
from requant.recipe import Recipe, load_recipe, parse_ratio, presets
from requant_kernels.errors import SchemeError
from requant_kernels.scheme import WeightScheme


@pytest.mark.parametrize("name", presets())
def test_presets_load_and_survive_a_round_trip(name):
    recipe = load_recipe(name)
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_a_file_is_a_recipe_too(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("weights: {bits: 3, group_size: 32}\noutliers: 0.25%\nignore: ['.*down_proj']\n")
    assert load_recipe(path) == Recipe(WeightScheme(3, 32), outliers=0.0025, ignore=(".*down_proj",))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("weights: {bits: 4}\nbeta: 1", "unknown key 'beta' .known: weights, base, "),
        ("bits: 4", "at least the key 'weights'"),
        ("weights: {bits: 5}", "bits: 5 is not one of"),
        ("weights: {bits: 4}\nbase: magic", "base 'magic' is not one of: rtn"),
        ("weights: {bits: 4}\noutliers: 0.5", "outliers 50.00% is outside 0 % to 10%"),
        ("weights: {bits: 4}\noutliers: -1%", "outliers -1.00% is outside"),
        ("weights: {bits: 4}\noutliers: nan", "outliers nan% is outside"),
        ("weights: {bits: 4}\noutliers: many", "'many' is not a ratio such as"),
        ("weights: {bits: 4}\nignore: ['(']", "ignore '.' is not a regular expression"),
        ("weights: {bits: 4}\nignore: lm_head", "ignore 'lm_head' is not a list"),
        ("weights: {bits: 4}\noutliers: 6%\nselection: {rule: adaptive}", "gives no matrix more than 5% outliers"),
        (
            "weights: {bits: 4, codebook: true}\nbase: kmeans\nequalization: {range: minmax}",
            "equalization is for uniform steps, not for the codebooks of base 'kmeans'",
        ),
        (
            "weights: {bits: 4}\ntarget_bits: 4.5\nselection: {restore: true}",
            "target_bits leaves nothing for selection.restore to add; leave one of them out",
        ),
        ("weights: {bits: 4}\nseed: x", "seed 'x' is not an integer"),
        ("weights: {bits: 4}\ncalibration: {text: 5}", "calibration: text 5 is not the name of a file"),
        ("weights: {bits: 4", "not YAML"),
    ],
)
def test_what_is_wrong_is_named(text, message, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises((InputError, SchemeError), match=message):
        load_recipe(path)


def test_a_file_in_another_encoding_is_refused(tmp_path):
    path = tmp_path / "latin.yaml"
    path.write_text("# f\u00fcr uns\nweights: {bits: 4}\n", encoding="latin-1")
    with pytest.raises(InputError, match=r"latin\.yaml: not UTF-8 .byte 3."):
        load_recipe(path)


def test_an_unknown_name_lists_the_presets():
    with pytest.raises(InputError, match=r"'w5': no such file, and not one of the presets: .*rtn-w4"):
        load_recipe("w5")


@pytest.mark.parametrize(("text", "ratio"), [("0.5%", 0.005), ("0.005", 0.005), (0, 0.0), (" 5 % ", 0.05)])
def test_ratios(text, ratio):
    assert parse_ratio(text) == pytest.approx(ratio)
