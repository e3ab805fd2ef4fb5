"""Mixture-of-experts models: experts are linear layers, and none is calibrated on nothing in silence."""

import json
import shutil
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from requant import api, architectures, models
from requant.aweq.settings import Activations
from requant.calibrated.run import CalibratedRun
from requant.calibrated.subject import Subject
from requant.calibration import Windows
from requant.cli import main
from requant.errors import InputError
from requant.pipeline import REPORT_FILE
from requant.recipe import Recipe
from requant.settings import Calibration, Distillation, Selection, Training
from requant.sources import load, resolve
from requant.stored import open_checkpoint
from requant.validation import read_layer
from requant_kernels.layer import QuantizedLayer
from requant_kernels.reference import dequantize
from requant_kernels.scheme import WeightScheme
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

W4 = WeightScheme(4, 32, symmetric=False)
SIZES = {"num_hidden_layers": 2, "num_experts_per_tok": 2}
LATENT = {
    "moe_intermediate_size": 64,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}
EXPERTS = {
    "mixtral": SIZES | {"num_local_experts": 4},
    "qwen2_moe": SIZES
    | {
        "num_experts": 4,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 96,
        "decoder_sparse_step": 2,  # the first block is dense
    },
    "qwen3_moe": SIZES | {"num_experts": 4, "moe_intermediate_size": 64},
    "olmoe": SIZES | {"num_experts": 4},
    # the first block is dense; a bias decides which experts a token takes, and not with what weight
    "glm4_moe": SIZES
    | {
        "n_routed_experts": 4,
        "moe_intermediate_size": 64,
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 1,
        "use_qk_norm": True,
    },
    "qwen3_next": SIZES | {"num_experts": 4, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 32},
    "qwen3_5_moe_text": SIZES | {"num_experts": 4, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 32},
    # routers in float32; their biases have another place in the file, as has phimoe's router
    "ernie4_5_moe": SIZES | {"moe_num_experts": 4, "moe_intermediate_size": 64},
    "phimoe": SIZES | {"num_local_experts": 4, "lm_head_bias": True},
    "hunyuan_v1_moe": SIZES | {"num_experts": 4},
    "exaone_moe": SIZES | {"num_experts": 4, "moe_intermediate_size": 64},
    "flex_olmo": SIZES | {"num_experts": 4},
    # under another name in transformers as well
    "lfm2_moe": SIZES | {"num_experts": 4, "moe_intermediate_size": 64, "num_dense_layers": 1},
    # queries by one layer, and by a narrow one first
    "deepseek_v2": SIZES | LATENT | {"n_routed_experts": 4, "q_lora_rank": None, "first_k_dense_replace": 1},
    "deepseek_v3": SIZES | LATENT | {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
    "glm4_moe_lite": SIZES | LATENT | {"n_routed_experts": 4},
}
IDS = torch.arange(1, 40)[None]


@pytest.fixture(scope="session", params=EXPERTS)
def model(request, tiny) -> Path:
    return tiny(request.param, **EXPERTS[request.param])


@pytest.fixture(scope="session")
def mixtral(tiny) -> Path:
    return tiny("mixtral", **EXPERTS["mixtral"])


def test_unfused_experts_compute_what_transformers_does_and_are_called_as_in_the_file(model):
    original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        expected = original(IDS).logits
        unfused = load(resolve(model), torch.float32)
        torch.testing.assert_close(unfused(IDS).logits, expected, atol=1e-6, rtol=1e-5)
    assert dict(models.stored_tensors(unfused)).keys() == load_file(model / "model.safetensors").keys()


@pytest.mark.parametrize(
    ("kind", "buffer"),
    [
        ("glm4_moe", "mlp.gate.e_score_correction_bias"),
        ("exaone_moe", "mlp.e_score_correction_bias"),
        ("lfm2_moe", "feed_forward.expert_bias"),
    ],
)
def test_what_is_no_parameter_is_stored_as_well(kind, buffer, tiny, tmp_path):
    source, out = tiny(kind, **EXPERTS[kind]), tmp_path / "out"
    bias = f"model.layers.1.{buffer}"
    tensors = load_file(source / "model.safetensors")
    tensors[bias] = torch.arange(4.0)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        logits, expected = deepcopy(load(resolve(source), torch.float32))(IDS).logits, original(IDS).logits
    torch.testing.assert_close(logits, expected, atol=1e-6, rtol=1e-5)
    api.quantize(source, out, Recipe(W4))
    stored = load_file(out / "model.safetensors")
    assert stored[bias].dtype == torch.float32
    assert torch.equal(stored[bias], tensors[bias])
    assert torch.equal(api.load_quantized(out).get_buffer(bias), tensors[bias])
    save_file(stored | {bias: stored[bias].half()}, out / "model.safetensors", {"format": "pt"})
    assert [str(defect) for defect in api.check(out)] == [
        f"model.safetensors: {bias}: dtype F16, but BF16 by config.json"
    ]


def test_every_expert_is_stored_checked_listed_and_loaded(model, tmp_path):
    out = tmp_path / "out"
    report = api.quantize(model, out, Recipe(W4, outliers=0.02))
    assert api.check(out, tensor_parallel=(1, 2)) == []
    rows, total = api.inspect(out)
    assert total == report.total
    assert {row.name for row in rows} == {row.name for row in report.layers}
    original = load(resolve(model), torch.float32)
    linears = models.linears(original, architectures.ARCHITECTURES[original.config.model_type])
    assert {row.name for row in report.layers if row.scheme} == set(linears)
    routers = {row.name for row in report.layers if row.reason == "router"}
    assert {name.rpartition(".")[2] for name in routers} <= {"gate", "wg", "shared_expert_gate"}
    assert routers
    apart = {row.name for row in report.layers if row.reason == "layer that vLLM takes apart"}
    latent = hasattr(original.config, "kv_lora_rank")
    assert {name.rpartition(".")[2] for name in apart} == ({"kv_b_proj"} if latent else set())
    loaded, stored = api.load_quantized(out), load_file(out / "model.safetensors")
    for name in routers | apart:
        assert torch.equal(loaded.get_parameter(f"{name}.weight"), stored[f"{name}.weight"].float())
    for name, linear in linears.items():
        weight = loaded.get_parameter(f"{name}.weight")
        assert 0 < (weight - linear.weight).norm() < 0.2 * linear.weight.norm(), name
        assert torch.equal(weight, dequantize(layer_of(out, name))), name
    assert torch.isfinite(loaded(IDS).logits).all()


def layer_of(out: Path, name: str) -> QuantizedLayer:
    stored = open_checkpoint(out)
    return read_layer(stored, name, stored.scheme.for_layer(name))


def test_w8a8_experts_round_their_inputs(mixtral, tmp_path):
    api.quantize(mixtral, tmp_path / "out", "rtn-w8a8")
    loaded, original = api.load_quantized(tmp_path / "out"), load(resolve(mixtral), torch.float32)
    with torch.no_grad():
        found, expected = (model(IDS).logits for model in (loaded, original))
    assert 0 < (found - expected).norm() < 0.05 * expected.norm()


@pytest.fixture(scope="session")
def starved(tiny, micro_llama, tmp_path_factory) -> Path:
    """A Mixtral with a tokenizer, the last of whose experts in the first block no token is routed to."""
    folder = tiny("mixtral", **EXPERTS["mixtral"] | {"num_experts_per_tok": 1, "vocab_size": 2048})
    for path in micro_llama.glob("tokenizer*"):
        shutil.copy(path, folder)
    tensors = load_file(folder / "model.safetensors")
    router = tensors["model.layers.0.block_sparse_moe.gate.weight"]
    router[3] = router[:3].float().mean(0)  # a mean is never the largest
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


STARVED = [f"model.layers.0.block_sparse_moe.experts.3.{name}" for name in ("w1", "w3", "w2")]
CALIBRATION = ("--samples", "3", "--seqlen", "64", "--group-size", "32")


@pytest.mark.parametrize("method", [("--base", "gptq"), ("--method", "rtn", "--significant", "0.2%")], ids=str)
def test_an_expert_that_no_token_reaches_is_an_error_that_names_it(method, starved, tmp_path, capsys):
    assert main(["quantize", str(starved), "-o", str(tmp_path / "out"), *CALIBRATION, *method]) == 1
    assert f"mixtral: {STARVED[0]}: no calibration token reaches this layer (3 in its block)" in capsys.readouterr().err


def test_on_request_it_is_rounded_to_nearest_and_named(starved, tmp_path, capsys):
    arguments = ["quantize", str(starved), *CALIBRATION, "-o"]
    assert main([*arguments, str(tmp_path / "gptq"), "--base", "gptq", "--unreached", "rtn"]) == 0
    line = f"rounded to nearest, for no calibration token reaches them: {', '.join(STARVED)}"
    assert line in capsys.readouterr().out.splitlines()
    report = json.loads((tmp_path / "gptq" / REPORT_FILE).read_text())
    assert report["calibration"]["unreached"] == STARVED
    assert main(["quantize", str(starved), "-o", str(tmp_path / "rtn"), "--group-size", "32"]) == 0
    gptq, rtn = (load_file(tmp_path / name / "model.safetensors") for name in ("gptq", "rtn"))
    same = {name.removesuffix(".weight_packed") for name, one in gptq.items() if torch.equal(one, rtn[name])}
    assert same & set(report_layers(report)) == set(STARVED)


def report_layers(report: dict) -> list[str]:
    return [row["name"] for row in report["layers"] if row["scheme"]]


@pytest.mark.parametrize(
    "more",
    [
        {"base": "gptq", "significant": 0.002, "selection": Selection(intervals=1)},
        {"base": "learned", "training": Training(steps=2)},
        {"target_bits": 5.0, "mixed": True, "selection": Selection(intervals=1)},
        {"base": "gptq", "distillation": Distillation(steps=2)},
        {"base": "gptq", "weights": WeightScheme(8), "activations": Activations("dynamic")},
    ],
    ids=["significant", "learned", "target", "distilled", "w8a8"],
)
def test_what_is_calibrated_through_experts(more, starved):
    network = load(resolve(starved), torch.float32).requires_grad_(False)
    original = deepcopy(network)
    recipe = Recipe(**{"weights": W4, "calibration": Calibration(unreached="rtn")} | more)
    linears = models.linears(network, architectures.ARCHITECTURES["mixtral"])
    schemes = dict.fromkeys(linears, recipe.layer_scheme)
    ids = [torch.randint(2048, (1, 64), generator=torch.Generator().manual_seed(i)) for i in range(3)]
    run = CalibratedRun(Subject(network, architectures.ARCHITECTURES["mixtral"], schemes, recipe, torch.bfloat16))
    calibrated = run.quantize(Windows(ids, ids, "random", "0"))
    assert calibrated.layers.keys() == linears.keys()
    assert calibrated.unreached == STARVED
    for name, layer in calibrated.layers.items():
        layer.validate(name)
        linears[name].weight.data.copy_(dequantize(layer))
    with torch.no_grad():
        found, expected = (one(ids[0]).logits for one in (network, original))
    assert (found - expected).norm() < 0.3 * expected.norm()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--base", "awq"), "mixtral: base 'awq' (use --base gptq) is not available for mixture-of-experts models"),
        (("--base", "kmeans"), "mixtral: base 'kmeans' (use --base gptq) is not available"),
        (("--bias-correction",), "mixtral: bias correction (use --no-bias-correction) is not available"),
        (("--bits", "8", "--activations", "static"), "mixtral: static input steps (use --activations dynamic) is not"),
        (("--equalize", "minmax"), "architecture 'mixtral': no equalization pairs are known for it"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_is_not_known_for_experts_is_refused_early(arguments, line, mixtral, tmp_path, capsys):
    assert main(["quantize", str(mixtral), "-o", str(tmp_path / "out"), *arguments]) == 1
    assert capsys.readouterr().err.startswith(f"error: {line}")


def test_a_router_that_is_declared_quantized_is_a_defect(mixtral, tmp_path):
    api.quantize(mixtral, tmp_path / "out", Recipe(W4))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["quantization_config"]["ignore"] = ["lm_head"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    line = "config.json: model.layers.0.block_sparse_moe.gate: a router is stored as it is, so a pattern of 'ignore'"
    assert str(api.check(tmp_path / "out")[0]).startswith(line)


def test_gate_and_up_of_an_expert_share_a_scheme(mixtral, tmp_path):
    with pytest.raises(InputError, match=r"^model\.layers\.0: .*experts\.0\.w1, .*experts\.0\.w3 run as one layer"):
        api.quantize(mixtral, tmp_path / "out", Recipe(W4, ignore=(r".*experts\.0\.w1",)))


def test_experts_of_a_block_are_all_ignored_or_none(mixtral, tmp_path):
    with pytest.raises(
        InputError, match=r"^model\.layers\.0\.block_sparse_moe\.experts\.1\.w1: is ignored, but not all"
    ):
        api.quantize(mixtral, tmp_path / "out", Recipe(W4, ignore=(r".*experts\.1\..*",)))
    report = api.quantize(mixtral, tmp_path / "out", Recipe(W4, ignore=(r".*layers\.1\..*experts\..*",)))
    assert report.total.skipped_layers == 1 + 2 + 12  # head, routers, experts of the second block
    assert api.check(tmp_path / "out") == []
