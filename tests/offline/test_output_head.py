"""A quantized output head, of its own or tied to the embeddings: made, checked, listed, loaded."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from requant import api
from requant.cli import main
from requant.errors import InputError
from requant.recipe import Recipe
from requant.settings import Calibration
from requant_kernels.errors import CheckpointError
from requant_kernels.reference import linear
from requant_kernels.rounding.layer import round_layer
from requant_kernels.scheme import HEAD_SCHEME, WeightScheme
from requant_kernels.w8a8.weight import W8A8Weight
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

W4 = Recipe(WeightScheme(4, 32, symmetric=False), quantize_lm_head=True)
STORED = {True: "model.embed_tokens", False: "lm_head"}
TIED = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


@pytest.fixture(scope="module")
def sources(tiny) -> dict[bool, Path]:
    return {tied: tiny("llama", tie_word_embeddings=tied) for tied in STORED}


@pytest.fixture(scope="module")
def made(sources, tmp_path_factory) -> dict[bool, Path]:
    folder = tmp_path_factory.mktemp("output heads")
    for tied, source in sources.items():
        api.quantize(source, folder / str(tied), W4)
    return {tied: folder / str(tied) for tied in sources}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def head_of(folder: Path, tied: bool) -> W8A8Weight:
    tensors = tensors_of(folder)
    parts = {part: tensors[f"{STORED[tied]}.{part}"] for part in ("weight", "weight_scale")}
    return W8A8Weight.from_tensors(HEAD_SCHEME, parts, "head")


@TIED
def test_one_set_of_tensors_is_stored(tied, made, sources):
    names = {name for name in tensors_of(made[tied]) if "layers" not in name}
    others = {"model.norm.weight"} | (set() if tied else {"model.embed_tokens.weight"})
    assert names == others | {f"{STORED[tied]}.weight", f"{STORED[tied]}.weight_scale"}
    original = AutoModelForCausalLM.from_pretrained(sources[tied]).lm_head.weight.double()
    head = head_of(made[tied], tied)
    decoded = head.codes.double() * head.scale.double()[:, None]
    # half a step, and what the ends of a row lose where its step was rounded to bfloat16
    assert bool(((decoded - original).abs() <= 0.51 * head.scale.double()[:, None] + 2**-9 * original.abs()).all())


@TIED
def test_it_is_sound_and_listed_apart_from_the_layers_of_the_blocks(tied, made, sources, tmp_path):
    assert api.check(made[tied], tensor_parallel=(1, 2)) == []
    rows, total = api.inspect(made[tied])
    plain = api.quantize(sources[tied], tmp_path / "plain", Recipe(W4.weights))
    assert rows[:-1] == api.inspect(tmp_path / "plain")[0][:-1]
    assert (total.layers, total.skipped_layers, total.bits_per_weight) == (14, 0, plain.total.bits_per_weight)
    assert total.head_bits_per_weight == rows[-1].bits_per_weight == 8 + 16 / 64
    assert rows[-1].name == "lm_head"
    said = "output head, tied to model.embed_tokens" if tied else "output head"
    assert rows[-1].describe() == f"w8a8 dynamic: {said}"
    report = json.loads((made[tied] / "requant_report.json").read_text())
    assert report["total"]["checkpoint_bytes"] == sum(tensor.nbytes for tensor in tensors_of(made[tied]).values())
    assert report["layers"][-1] == {**rows[-1].to_dict(), "error": report["layers"][-1]["error"], "shape": [97, 64]}
    assert 0 < report["layers"][-1]["error"] < 0.01
    assert f"| output head | w8a8 dynamic: {said} |" in (made[tied] / "README.md").read_text()


@TIED
def test_transformers_looks_up_and_multiplies_as_the_format_says(tied, made):
    model, head = api.load_quantized(made[tied]), head_of(made[tied], tied)
    rows = head.codes.float() * head.scale.float()[:, None]
    if tied:
        assert torch.equal(model.get_input_embeddings().weight, rows)
        assert model.lm_head.weight is model.get_input_embeddings().weight
    tokens = torch.tensor([[1, 2, 96, 5]])
    with torch.no_grad():
        hidden = model.model(tokens).last_hidden_state
        torch.testing.assert_close(model(tokens).logits, linear(hidden, head), rtol=1e-5, atol=1e-6)
    narrow = AutoModelForCausalLM.from_pretrained(made[tied])
    assert torch.equal(narrow.lm_head.weight, rows.to(torch.bfloat16))


@TIED
def test_by_the_command_line(tied, sources, made, tmp_path, capsys):
    out = str(tmp_path / "out")
    options = ["--bits", "4", "--group-size", "32", "--no-symmetric", "--quantize-lm-head"]
    assert main(["quantize", str(sources[tied]), "-o", out, *options]) == 0
    assert "0 as they were; the output head at 8.25; " in capsys.readouterr().out
    assert main(["check", out]) == 0
    assert tensors_of(Path(out)).keys() == tensors_of(made[tied]).keys()
    assert main(["inspect", out]) == 0
    assert re.search(r"^lm_head +97 x 64 +w8a8 dynamic: output head", capsys.readouterr().out, re.M)


def test_the_head_alone(sources, tmp_path):
    recipe = Recipe(W4.weights, ignore=(r"model\..*",), quantize_lm_head=True)
    report = api.quantize(sources[True], tmp_path / "out", recipe)
    assert (report.total.layers, report.total.skipped_layers) == (0, 14)
    assert api.check(tmp_path / "out") == []


def test_calibration_leaves_it_what_it_is(micro_llama, tmp_path):
    calibrated = replace(W4, base="gptq", calibration=Calibration(samples=2, seqlen=16))
    for name, recipe in (("calibrated", calibrated), ("not", W4)):
        api.quantize(micro_llama, tmp_path / name, recipe)
    assert api.check(tmp_path / "calibrated") == []
    calibrated, plain = (tensors_of(tmp_path / name) for name in ("calibrated", "not"))
    head = [name for name in plain if name.startswith(("lm_head.", "model.embed_tokens."))]
    assert any(name.endswith(".weight_scale") for name in head)
    assert all(torch.equal(calibrated[name], plain[name]) for name in head)


@pytest.mark.parametrize(("model_type", "tied"), [("gemma", True), ("opt", True), ("opt", False)])
def test_heads_that_vllm_does_not_quantize_are_refused(model_type, tied, tiny, tmp_path):
    source = tiny(model_type, tie_word_embeddings=tied)
    kind = "tied" if tied else "untied"
    with pytest.raises(InputError, match=rf"^lm_head: vLLM can not quantize the {kind} output head of '{model_type}'$"):
        api.quantize(source, tmp_path / "out", W4)


def test_a_head_that_is_ignored_and_quantized_is_refused(sources, tmp_path):
    with pytest.raises(InputError, match=r"^ignore: matches lm_head"):
        api.quantize(sources[False], tmp_path / "out", Recipe(W4.weights, ignore=(".*",), quantize_lm_head=True))


def test_the_recipe_takes_only_yes_and_no():
    with pytest.raises(InputError, match="quantize_lm_head 8 is not true or false"):
        Recipe(W4.weights, quantize_lm_head=8)


def of_scheme(tensors, config):
    config["quantization_config"]["overrides"] = {}


def static(tensors, config):
    config["quantization_config"]["overrides"]["lm_head"]["activations"]["dynamic"] = False


def undeclared(tensors, config):
    config["quantization_config"]["overrides"] = {}
    config["quantization_config"]["ignore"] = ["lm_head"]


def edit(name, change):
    return lambda tensors, config: tensors.__setitem__(name, change(tensors[name]))


def poison(scale):
    scale[3] = float("nan")
    return scale


EMBED = "model.embed_tokens"
FILE = r"model\.safetensors"
TAMPERED = {
    "another scheme": (of_scheme, r"config\.json: lm_head: an output head can be int8"),
    "static steps": (static, r"config\.json: lm_head: an output head can be int8"),
    "not declared": (undeclared, rf"{FILE}: {EMBED}\.weight_scale: not expected in this model"),
    "no scale": (
        lambda tensors, config: tensors.pop(f"{EMBED}.weight_scale"),
        rf"{FILE}: {EMBED}\.weight_scale: missing",
    ),
    "a scale too few": (
        edit(f"{EMBED}.weight_scale", lambda scale: scale[:-1]),
        rf"{FILE}: {EMBED}\.weight_scale: shape \[96\], expected \[97\]",
    ),
    "a scale that is NaN": (edit(f"{EMBED}.weight_scale", poison), rf"{FILE}: {EMBED}\.weight_scale: not finite"),
    "a token too many": (
        edit(f"{EMBED}.weight", lambda codes: torch.cat((codes, codes[:1]))),
        rf"{FILE}: {EMBED}\.weight: shape \[98, 64\], but \[97, 64\] by config\.json",
    ),
    "floating-point codes": (
        edit(f"{EMBED}.weight", lambda codes: codes.bfloat16()),
        rf"{FILE}: {EMBED}\.weight: torch\.bfloat16 \[97, 64\], not int8",
    ),
    "a second head": (
        lambda tensors, config: tensors.__setitem__("lm_head.weight", tensors[f"{EMBED}.weight"].clone()),
        rf"{FILE}: lm_head\.weight: not expected in this model",
    ),
}


@pytest.mark.parametrize(("change", "expected"), TAMPERED.values(), ids=TAMPERED)
def test_a_tampered_head_is_named_and_nothing_loads(change, expected, made, tmp_path):
    folder = Path(shutil.copytree(made[True], tmp_path / "tampered"))
    tensors, config = tensors_of(folder), json.loads((folder / "config.json").read_text())
    change(tensors, config)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    (folder / "config.json").write_text(json.dumps(config))
    lines = [str(defect) for defect in api.check(folder)]
    assert any(re.match(expected, line) for line in lines), lines
    with pytest.raises(CheckpointError) as refusal:
        api.load_quantized(folder)
    assert str(refusal.value) == lines[0]


def test_rows_are_rounded_with_steps_of_their_own():
    weight = torch.tensor([[1.0, -2.0, 0.25], [0.0, 0.0, 0.0], [1e-3, 0.0, 2e-3]], dtype=torch.bfloat16)
    head = round_layer(weight, HEAD_SCHEME)
    assert head.codes.dtype == torch.int8
    assert not head.codes[1].any()
    decoded = head.codes.double() * head.scale.double()[:, None]
    assert bool(((decoded - weight.double()).abs() <= head.scale.double()[:, None] * 0.51).all())
