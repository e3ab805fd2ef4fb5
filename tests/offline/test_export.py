"""`requant export`: other programs compute from it what the checkpoint says, or a layer is refused by name."""

import json
import re

import pytest
import torch
from requant import api
from requant.aweq.settings import Activations
from requant.cli import main
from requant.errors import InputError
from requant.recipe import Override, Recipe
from requant.settings import Calibration
from requant_kernels.errors import CheckpointError
from requant_kernels.scheme import WeightScheme
from safetensors import safe_open
from transformers import AutoModelForCausalLM

IDS = torch.tensor([[5 + 7 * i % 90 for i in range(20)]])
W4, W4_ROWS, W8 = WeightScheme(4, 32, symmetric=False), WeightScheme(4), WeightScheme(8, 64)
SPARSE = Recipe(W4, outliers=0.02)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def exported(model, recipe, folder, to):
    """The logits of the checkpoint, and of what it is exported to, by transformers."""
    api.quantize(model, folder / "out", recipe)
    api.export(folder / "out", folder / "theirs", to)
    theirs = AutoModelForCausalLM.from_pretrained(folder / "theirs", dtype=torch.float32)
    return logits(api.load_quantized(folder / "out")), logits(theirs)


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(W4),
        Recipe(W4_ROWS),
        Recipe(W8),
        Recipe(W4, overrides={r".*down_proj": Override(W8)}, ignore=(r".*1\.self_attn.*",)),
    ],
    ids=["groups", "rows", "8 bit", "mixed"],
)
def test_compressed_tensors_reads_the_same_weights(recipe, llama, tmp_path):
    """By the library itself, which transformers calls."""
    ours, theirs = exported(llama, recipe, tmp_path, "compressed-tensors")
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors_rounds_inputs_by_the_same_static_steps(symmetric, micro_llama, tmp_path):
    activations = Activations("static", symmetric=symmetric, limit=1e9)  # none becomes dynamic
    recipe = Recipe(WeightScheme(8), activations=activations, calibration=Calibration(samples=2, seqlen=64))
    ours, theirs = exported(micro_llama, recipe, tmp_path, "compressed-tensors")
    assert torch.equal(ours, theirs)


def test_of_dynamic_steps_it_is_told_what_they_are(llama, tmp_path):
    """The library's own emulation divides by 127.5 where ours, and kernels of vLLM, divide by 127."""
    api.quantize(llama, tmp_path / "out", Recipe(WeightScheme(8), activations=Activations("dynamic")))
    api.export(tmp_path / "out", tmp_path / "theirs", "compressed-tensors")
    [group] = json.loads((tmp_path / "theirs/config.json").read_text())["quantization_config"]["config_groups"].values()
    assert group["format"] == "int-quantized"
    asked = group["input_activations"]
    assert asked == {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


@pytest.mark.parametrize("recipe", [SPARSE, Recipe(WeightScheme(3, 64), outliers=0.01)], ids=["4 bit", "3 bit"])
def test_a_dense_model_is_the_decoded_one_in_its_own_dtype(recipe, llama, tmp_path):
    ours, theirs = exported(llama, recipe, tmp_path, "dense")
    decoded = api.load_quantized(tmp_path / "out")
    config = json.loads((tmp_path / "theirs/config.json").read_text())
    assert "quantization_config" not in config
    with safe_open(tmp_path / "theirs/model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a mapping
            assert torch.equal(file.get_tensor(name), decoded.get_parameter(name).to(torch.bfloat16)), name
    assert 0 < (ours - theirs).abs().max() < 0.01 * ours.std()


@pytest.mark.usefixtures("words")
def test_a_bias_correction_becomes_part_of_the_bias(tiny, tmp_path):
    recipe = Recipe(W4_ROWS, bias_correction=True, calibration=Calibration(samples=8, seqlen=32))
    ours, theirs = exported(tiny("opt", dtype=torch.float32), recipe, tmp_path, "compressed-tensors")
    assert any(row.scheme and row.scheme.bias_correction for row in api.inspect(tmp_path / "out")[0])
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)


def test_inputs_that_are_no_longer_rounded_are_told(llama, tmp_path, capsys):
    api.quantize(llama, tmp_path / "out", Recipe(W4, quantize_lm_head=True))
    arguments = ["export", str(tmp_path / "out"), "--to", "dense", "-o", str(tmp_path / "theirs")]
    assert main(arguments) == 0
    assert "theirs: written\n1 layers: their weights are those of the checkpoint" in capsys.readouterr().out
    assert main(arguments) == 1
    assert "exists; use --overwrite" in capsys.readouterr().err


def test_the_same_checkpoint_gives_the_same_bytes(quantized, tmp_path):
    for name in ("a", "b"):
        api.export(quantized, tmp_path / name, "dense")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


REFUSED = {
    "sparse": (SPARSE, "model.layers.0.self_attn.q_proj: has a sparse part, for which compressed-tensors has no place"),
    "3 bit": (Recipe(WeightScheme(3, 64)), "q_proj: has 3 bits, which no kernel of vLLM"),
    "codebook": (
        Recipe(WeightScheme(4, codebook=True), base="kmeans", calibration=Calibration(samples=2, seqlen=16)),
        "q_proj: has a codebook, which no kernel of vLLM",
    ),
    "head": (Recipe(W4, quantize_lm_head=True), "lm_head: an int8 output head is not exported"),
    "correction": (
        Recipe(W4_ROWS, bias_correction=True, calibration=Calibration(samples=8, seqlen=128)),
        "proj: its bias correction has no place",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_place_there_is_refused_by_name(name, micro_llama, tmp_path):
    recipe, message = REFUSED[name]
    api.quantize(micro_llama, tmp_path / "out", recipe)
    with pytest.raises(InputError, match=re.escape(message)):
        api.export(tmp_path / "out", tmp_path / "theirs", "compressed-tensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_routed_experts_are_refused(tiny, tmp_path):
    api.quantize(tiny("mixtral"), tmp_path / "out", Recipe(W4))
    with pytest.raises(InputError, match=r"^routed experts are not exported to compressed-tensors; use --to dense"):
        api.export(tmp_path / "out", tmp_path / "theirs", "compressed-tensors")


def test_a_broken_checkpoint_and_an_unknown_format_are_refused(checkpoint, tmp_path):
    with pytest.raises(InputError, match=r"^export: 'gguf' is not one of dense, compressed-tensors"):
        api.export(checkpoint, tmp_path / "theirs", "gguf")
    (checkpoint / "model-00001-of-00003.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"^model-00001-of-00003.safetensors: not a whole safetensors file"):
        api.export(checkpoint, tmp_path / "theirs", "dense")
