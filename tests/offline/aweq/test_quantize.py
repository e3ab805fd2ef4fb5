"""The whole walk: recipe -> checkpoint -> transformers, for every kind of model."""

import re
from dataclasses import replace

import pytest
import torch
import yaml
from requant import api, cli
from requant.architectures import ARCHITECTURES
from requant.aweq.settings import Activations, Equalization
from requant.errors import InputError
from requant.options import recipe_of
from requant.recipe import Override, Recipe, load_recipe
from requant.settings import Calibration
from requant.stored import open_checkpoint
from requant.validation import read_layer
from requant_kernels.errors import SchemeError
from requant_kernels.reference import linear
from requant_kernels.scheme import W8A8_WEIGHTS, WeightScheme
from torch import nn
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.usefixtures("words")
FEW = Calibration(samples=4, seqlen=32)
BOTH = {"equalization": Equalization("minmax", 0.5), "bias_correction": True, "calibration": FEW}
IDS = torch.arange(1, 25)[None]


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def difference(folder, original):
    wanted = logits(AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32))
    return float((logits(api.load_quantized(folder)) - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("mode", ["dynamic", "static"])
@pytest.mark.parametrize(
    "kind", ["llama", "mistral", "qwen2", "qwen3", "gemma", "opt", "phi3", "cohere", "nemotron", "exaone4"]
)
def test_every_kind_of_model_survives_w8a8(kind, mode, tiny, tmp_path):
    source, out = tiny(kind), tmp_path / "out"
    report = api.quantize(source, out, Recipe(W8A8_WEIGHTS, activations=Activations(mode), **BOTH))
    assert api.check(out, (1, 2)) == []
    assert difference(out, source) < 0.05
    rows, _ = api.inspect(out)
    assert {row.describe().split(" + ")[0] for row in rows if row.scheme} <= {"w8a8 static", "w8a8 dynamic"}
    assert {row.name: row.scheme for row in rows} == {row.name: row.scheme for row in report.layers}
    assert any("bias correction kept in" in line for line in report.remarks())


def test_a_loaded_layer_computes_what_the_reference_says(tiny, tmp_path):
    out = tmp_path / "out"
    api.quantize(tiny("opt"), out, Recipe(W8A8_WEIGHTS, activations=Activations("static"), **BOTH))
    model, stored = api.load_quantized(out), open_checkpoint(out)
    for local in ("self_attn.q_proj", "self_attn.out_proj", "fc1", "fc2"):
        name = f"model.decoder.layers.1.{local}"
        module = model.get_submodule(name)
        layer = read_layer(stored, name, stored.scheme.for_layer(name))
        bias = stored.read(f"{name}.bias").float()
        x = torch.randn(3, module.in_features)
        torch.testing.assert_close(module(x), linear(x, layer, bias), rtol=1e-4, atol=1e-5)


def test_one_model_mixes_int8_few_bits_and_untouched_layers(tiny, tmp_path):
    recipe = Recipe(
        WeightScheme(4, 32, symmetric=False),
        outliers=0.01,
        overrides={
            r".*self_attn\..*": Override(activations=Activations("static")),
            r".*layers\.1\.mlp\.down_proj": Override(WeightScheme(3, 32, symmetric=False)),
        },
        ignore=(r".*layers\.0\.mlp\.down_proj",),
        **BOTH,
    )
    source, out = tiny("llama"), tmp_path / "out"
    api.quantize(source, out, recipe)
    assert api.check(out) == []
    described = {row.name: row.describe() for row in api.inspect(out)[0]}
    assert described["model.layers.0.self_attn.q_proj"].startswith("w8a8")
    assert described["model.layers.0.mlp.up_proj"].startswith("w4 g32 asym + sparse")
    assert described["model.layers.0.mlp.down_proj"] == "as it was: ignored by the recipe"
    assert described["model.layers.1.mlp.down_proj"].startswith("w3 g32 asym + sparse")
    assert difference(out, source) < 0.2


@pytest.mark.parametrize("per_tensor", [False, True], ids=["per row", "per tensor"])
def test_without_calibration_text_too(per_tensor, tiny, tmp_path):
    source, out = tiny("llama"), tmp_path / "out"
    api.quantize(source, out, Recipe(W8A8_WEIGHTS, activations=Activations("dynamic", per_tensor=per_tensor)))
    assert api.check(out) == []
    scale = open_checkpoint(out).read("model.layers.0.mlp.up_proj.weight_scale")
    assert (len(scale.unique()) == 1) == per_tensor
    assert difference(out, source) < 0.05


@pytest.mark.parametrize("base", ["rtn", "gptq"])
def test_few_bits_are_equalized_and_corrected_on_any_base(base, tiny, tmp_path):
    source, out = tiny("qwen2"), tmp_path / "out"
    report = api.quantize(source, out, Recipe(WeightScheme(4, 32, symmetric=False), base, **BOTH))
    assert api.check(out) == []
    assert report.remarks()[0] == "8 of 8 pairs equalized"
    assert difference(out, source) < 0.3


def test_the_same_run_gives_the_same_bytes(tiny, tmp_path):
    source = tiny("gemma")
    recipe = Recipe(W8A8_WEIGHTS, activations=Activations("static"), **BOTH)
    for name in ("one", "two"):
        api.quantize(source, tmp_path / name, recipe)
    one, two = (sorted((tmp_path / name).iterdir()) for name in ("one", "two"))
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": WeightScheme(4, 32)}, "activations: need weights of 8 bits"),
        ({"base": "learned"}, "base 'learned' is trained without rounded inputs"),
        ({"base": "awq", "equalization": Equalization("minmax")}, "base 'awq' equalizes by itself"),
        ({"base": "gptq", "activations": Activations("static", per_tensor=True)}, "per_tensor needs base 'rtn'"),
        ({"bias_correction": 1}, "bias_correction 1 is not true or false"),
        ({"overrides": {"(": Override()}}, r"overrides '\(' is not a regular expression"),
    ],
)
def test_what_does_not_go_together_is_refused(changes, message):
    settings = {"weights": W8A8_WEIGHTS, "activations": Activations("static")} | changes
    with pytest.raises((InputError, SchemeError), match=message):
        Recipe(**settings)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("equalization: {range: max}", "equalization: range 'max' is not one of none, minmax, absmax"),
        ("equalization: {alpha: 2}", "alpha 2 is not a number from 0 to 1, or 'search'"),
        ("activations: {mode: fast}", "mode 'fast' is not one of"),
        ("activations: {range: best}", "range 'best' is not one of minmax, percentile, mse"),
        ("activations: {symmetric: 1}", "symmetric 1 is not true or false"),
        ("activations: {limit: -1}", "limit -1 is not a number of at least 0"),
        ("activations: {per_tensor: true}", "per_tensor is of W8A8, which mode 'none' is not"),
        ("overrides: {a: {activations: {per_tensor: true}}}", "per_tensor is of W8A8, which mode 'none' is not"),
        ("activations: dynamic", r"activations: expected a mapping \(known keys: mode"),
        ("overrides: [a]", r"overrides \['a'\] is not a mapping"),
        ("overrides: {a: {bits: 4}}", "a: expected a mapping with the keys weights and activations"),
    ],
)
def test_a_wrong_recipe_is_refused_in_a_line(part, message, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("weights: {bits: 8}\n" + part)
    with pytest.raises(InputError, match=message):
        load_recipe(path)


def test_an_override_that_matches_nothing_is_refused(tiny, tmp_path):
    recipe = Recipe(W8A8_WEIGHTS, activations=Activations("dynamic"), overrides={"nothing": Override()})
    with pytest.raises(InputError, match="overrides 'nothing': matches no linear layer"):
        api.quantize(tiny("llama"), tmp_path / "out", recipe)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--method", "aweq"], load_recipe("aweq-w8a8")),
        (["--method", "aweq", "--bits", "8", "--activations", "static"], load_recipe("aweq-w8a8-static")),
        (["--activations", "dynamic"], load_recipe("rtn-w8a8")),
        (["--method", "aweq", "--bits", "4"], load_recipe("aweq-w4")),
        (
            ["--method", "aweq", "--bits", "3", "--base", "gptq"],
            replace(load_recipe("aweq-w4"), weights=WeightScheme(3, 64, symmetric=False), base="gptq"),
        ),
        (
            ["--equalize", "absmax", "--alpha", "0.5", "--bias-correction"],
            replace(load_recipe("rtn-w4"), equalization=Equalization("absmax", 0.5), bias_correction=True),
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_options_mean(options, expected):
    arguments = vars(cli._parser().parse_args(["quantize", "MODEL", "-o", "OUT", *options]))
    assert recipe_of({name: value for name, value in arguments.items() if value is not None}) == expected


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_dynamic_preset_means_the_last_layer_of_every_mlp(kind):
    one = ARCHITECTURES[kind]
    down = (f"{one.experts.holder}.experts.0.{one.experts.down}",) if one.experts else ()
    attention = ("self_attn.", "linear_attn.", "conv.", "mamba.")
    [pattern] = load_recipe("aweq-w8a8").overrides
    meant = {name for name in (*one.linears, *down) if re.fullmatch(pattern, f"{one.blocks}.0.{name}")}
    assert meant == {name for name in (*one.outputs, *down) if not name.startswith(attention)}


MIXED = Recipe(
    W8A8_WEIGHTS,
    activations=Activations("dynamic", per_tensor=True),
    overrides={
        "lopsided": Override(activations=Activations("dynamic", symmetric=False, per_tensor=True)),
        "few bits": Override(WeightScheme(4, 32)),
    },
)


@pytest.mark.parametrize("mode", ["static", "none"])
def test_a_mode_of_the_command_line_is_that_of_every_rounded_input(mode, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(MIXED.to_dict()))
    found = recipe_of({"recipe": path, "activations": mode})
    kept = {"mode": mode, "per_tensor": mode != "none"}
    assert found.activations == Activations(**kept)
    assert found.overrides == MIXED.overrides | {"lopsided": Override(activations=Activations(symmetric=False, **kept))}


@pytest.mark.parametrize("given", [{}, {"recipe": "aweq-w8a8", "equalize": "none"}], ids=["no range", "range none"])
def test_an_alpha_of_no_equalization_is_refused(given):
    with pytest.raises(InputError, match="--alpha: nothing is equalized; add --equalize minmax or absmax"):
        recipe_of(given | {"alpha": 0.5})


def test_the_command_says_what_was_decided(tiny, tmp_path, capsys):
    source, out, recipe = tiny("llama"), tmp_path / "out", tmp_path / "recipe.yaml"
    recipe.write_text("weights: {bits: 8}\ncalibration: {samples: 4, seqlen: 32}\n")
    options = ["--recipe", str(recipe), "--activations", "static", "--equalize", "minmax", "--alpha", "0.5"]
    assert cli.main(["quantize", str(source), "-o", str(out), *options, "--bias-correction"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert lines[0] == "8 of 8 pairs equalized"
    assert re.fullmatch(r"\d+ of 14 layers that were to be static made dynamic", lines[1])
    assert re.fullmatch(r"bias correction kept in \d+ of 14 layers", lines[2])


def test_no_linear_layer_keeps_a_hook_in_a_weights_only_checkpoint(tiny, tmp_path):
    out = tmp_path / "out"
    api.quantize(tiny("llama"), out, Recipe(WeightScheme(4, 32), bias_correction=True, calibration=FEW))
    model = api.load_quantized(out)
    assert not any(module._forward_pre_hooks for module in model.modules() if isinstance(module, nn.Linear))
