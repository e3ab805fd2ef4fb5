"""Whatever a user can get wrong: one line, exit code 1, no traceback, nothing half-written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from requant.architectures import ARCHITECTURES
from requant.cli import main
from safetensors.torch import load_file, save_file


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def refused(capsys, tmp_path) -> Callable[..., str]:
    """Runs a command that must be refused; gives its one line."""

    def run(*arguments: object) -> str:
        before = sorted(tmp_path.rglob("*"))
        assert main([str(argument) for argument in arguments]) == 1
        printed = capsys.readouterr()
        assert printed.out == ""
        [line] = [line for line in printed.err.splitlines() if not line.startswith("quantizing blocks")]
        assert sorted(tmp_path.rglob("*")) == before
        return line.removeprefix("error: ")

    return run


def model_folder(folder: Path, **config: object) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def with_tensor(source: Path, folder: Path, name: str, value: float | None) -> Path:
    """A copy of ``source`` with one entry of ``name`` overwritten, or without the tensor."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    if value is None:
        del tensors[name]
    else:
        tensors[name].view(-1)[7] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_missing_folder(refused, tmp_path):
    assert refused("quantize", tmp_path / "absent", "-o", tmp_path / "out").endswith("absent: no such model folder")
    for command in ("check", "inspect"):
        assert refused(command, tmp_path / "absent").endswith("absent: no such checkpoint folder")


def test_an_empty_name_is_not_the_current_folder(refused, llama, tmp_path, monkeypatch):
    monkeypatch.chdir(llama)
    for command in (("quantize", "", "-o", tmp_path / "out"), ("eval", "", "--text", __file__)):
        assert refused(*command) == "the name of the model is empty"


def test_a_hub_name_that_is_not_cached(refused, tmp_path):
    line = refused("quantize", "nobody/nothing", "-o", tmp_path / "out")
    assert line.startswith("nobody/nothing: no such folder, and not to be had from the hub (")


def test_a_folder_without_config(refused, tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    assert refused("quantize", folder, "-o", tmp_path / "out") == f"{folder}: holds no config.json"


def test_a_config_that_is_no_json(refused, tmp_path):
    folder = model_folder(tmp_path / "model")
    (folder / "config.json").write_text("{")
    assert "config.json: not readable as JSON" in refused("quantize", folder, "-o", tmp_path / "out")


def test_not_a_causal_lm(refused, tmp_path):
    folder = model_folder(tmp_path / "bert", model_type="bert", architectures=["BertForMaskedLM"])
    line = refused("quantize", folder, "-o", tmp_path / "out")
    assert line == f"{folder}: not a causal language model, but BertForMaskedLM"
    folder = model_folder(tmp_path / "judge", model_type="llama", architectures=["LlamaForSequenceClassification"])
    assert "not a causal language model" in refused("quantize", folder, "-o", tmp_path / "out")


def test_an_unsupported_architecture(refused, tmp_path):
    folder = model_folder(tmp_path / "model", model_type="gpt2", architectures=["GPT2LMForCausalLM"])
    line = refused("quantize", folder, "-o", tmp_path / "out")
    assert line.startswith(f"{folder}: architecture 'gpt2' is not supported (supported: llama, mistral, ministral3")


def test_an_already_quantized_model(refused, quantized, tmp_path):
    line = refused("quantize", quantized, "-o", tmp_path / "out")
    assert line.endswith("its weights are already quantized (requant); start from the original")
    folder = model_folder(tmp_path / "model", model_type="llama", quantization_config={"quant_method": "gptq"})
    assert "already quantized (gptq)" in refused("quantize", folder, "-o", tmp_path / "out")
    assert "already quantized (gptq)" in refused("eval", folder, "--text", __file__)


def test_a_quantization_that_is_no_object(refused, tmp_path):
    folder = model_folder(tmp_path / "model", model_type="llama", quantization_config="gptq")
    assert "already quantized (an unnamed method)" in refused("quantize", folder, "-o", tmp_path / "out")


def test_a_quantization_of_null_is_none(llama, tmp_path):
    model = Path(shutil.copytree(llama, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": None}))
    out = tmp_path / "out"
    assert main(["quantize", str(model), "-o", str(out), "--group-size", "32"]) == 0
    assert main(["check", str(out)]) == 0


def test_a_group_that_does_not_divide(refused, llama, tmp_path):
    line = refused("quantize", llama, "-o", tmp_path / "out", "--group-size", 128)
    assert line == (
        "model.layers.0.self_attn.q_proj: group size 128 does not divide in_features 64; "
        "sizes that divide every layer: -1, 32, 64 (-1 is one group per row)"
    )


def test_a_group_that_does_not_exist(refused, llama, tmp_path):
    line = refused("quantize", llama, "-o", tmp_path / "out", "--group-size", 48)
    assert line == "weights.group_size: 48 is not one of (-1, 32, 64, 128, 256)"


def test_in_features_that_do_not_fill_words(refused, tiny, tmp_path):
    odd = tiny("llama", intermediate_size=80)
    line = refused("quantize", odd, "-o", tmp_path / "out", "--group-size", -1)
    assert line.startswith("model.layers.0.mlp.down_proj: in_features 80 is not a multiple of 32")
    # and the way out that the line names
    assert (
        main(["quantize", str(odd), "-o", str(tmp_path / "out"), "--group-size", "-1", "--ignore", ".*down_proj"]) == 0
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["NaN", "Inf"])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_weights_that_are_not_finite(name, value, refused, llama, tmp_path):
    broken = with_tensor(llama, tmp_path / "broken", name, value)
    line = refused("quantize", broken, "-o", tmp_path / "out")
    assert line == f"{name}: holds NaN or infinite values; the model itself is broken"


def test_weights_that_are_absent(refused, llama, tmp_path):
    broken = with_tensor(llama, tmp_path / "broken", "model.layers.1.mlp.up_proj.weight", None)
    line = refused("quantize", broken, "-o", tmp_path / "out")
    assert line == f"{broken}: model.layers.1.mlp.up_proj.weight is missing (1 tensors in all)"


def test_a_truncated_model(refused, llama, tmp_path):
    broken = Path(shutil.copytree(llama, tmp_path / "broken"))
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert refused("quantize", broken, "-o", tmp_path / "out").startswith(f"{broken}: can not be loaded (")


def test_a_folder_without_safetensors(refused, llama, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(llama / "config.json", folder)
    assert refused("quantize", folder, "-o", tmp_path / "out").startswith(f"{folder}: can not be loaded (")


def test_out_exists(refused, llama, quantized, tmp_path):
    (tmp_path / "out").mkdir()
    assert refused("quantize", llama, "-o", tmp_path / "out").endswith("out: exists; use --overwrite to replace it")


@pytest.mark.parametrize("out", ["", ".", ".."])
def test_out_is_where_the_user_stands(out, refused, llama, tmp_path, monkeypatch):
    (tmp_path / "model" / "within").mkdir(parents=True)
    shutil.copy(llama / "config.json", tmp_path / "model")
    monkeypatch.chdir(tmp_path / "model" / ("within" if out == ".." else ""))
    line = refused("quantize", llama, "-o", out, "--overwrite")
    assert line == f"{tmp_path / 'model'}: is the current folder, or holds it; name a folder to make"


def test_out_inside_the_model(refused, llama):
    assert "overlaps the model itself" in refused("quantize", llama, "-o", llama / "out")
    assert "overlaps the model itself" in refused("quantize", llama, "-o", llama, "--overwrite")


def test_calibration_text_is_read_before_the_model(refused, micro_llama, tmp_path, monkeypatch):
    monkeypatch.setattr("requant.sources.load", lambda *_: pytest.fail("the model is loaded"))
    start = ("quantize", micro_llama, "-o", tmp_path / "out", "--base", "gptq")
    assert "absent.txt" in refused(*start, "--calibration", tmp_path / "absent.txt")
    assert "exceeds the model's context of" in refused(*start, "--seqlen", 10**6)


def test_a_pattern_that_matches_nothing(refused, llama, tmp_path):
    line = refused("quantize", llama, "-o", tmp_path / "out", "--ignore", "down_proj")
    assert line.startswith("ignore 'down_proj': matches no linear layer (one is named model.layers.0.self_attn.q_proj")


def test_a_pattern_that_matches_everything(refused, llama, tmp_path):
    assert refused("quantize", llama, "-o", tmp_path / "out", "--ignore", ".*") == "ignore: leaves no layer to quantize"


@pytest.mark.parametrize(
    ("arguments", "asked"),
    [
        (("--activations", "dynamic", "--significant", "0.1%"), "significant"),
        (("--activations", "dynamic", "--outliers", "5%"), "outliers"),
        (("--quantize-lm-head", "--ignore", ".*layers.*", "--base", "gptq", "--significant", "0.1%"), "significant"),
        (("--quantize-lm-head", "--ignore", ".*layers.*", "--target-bits", "4"), "target_bits"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_sparse_entries_that_no_layer_can_hold(arguments, asked, refused, llama, tmp_path):
    line = refused("quantize", llama, "-o", tmp_path / "out", *arguments)
    assert line.startswith(f"{asked}: no layer to quantize can have a sparse part, which W8A8 layers and the output")


def test_outliers_at_adaptive_ratios_that_no_layer_can_hold(refused, llama, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("weights: {bits: 8}\nactivations: {mode: dynamic}\noutliers: 1%\nselection: {rule: adaptive}\n")
    assert refused("quantize", llama, "-o", tmp_path / "out", "--recipe", recipe).startswith("outliers: no layer")


def test_a_pattern_that_splits_what_vllm_fuses(refused, llama, tmp_path):
    line = refused("quantize", llama, "-o", tmp_path / "out", "--ignore", ".*q_proj")
    assert line.startswith("model.layers.0: self_attn.q_proj, self_attn.k_proj, self_attn.v_proj run as one layer")


def test_no_gpu(refused, llama, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    line = refused("quantize", llama, "-o", tmp_path / "out", "--device", "cuda")
    assert line == "--device cuda: PyTorch finds no CUDA device here; use --device cpu"


@pytest.mark.parametrize("size", ["0GB", "many", "-5MB", "10"])
def test_a_shard_size_that_is_none(size, refused, llama, tmp_path):
    assert "is not a size such as 5GB" in refused("quantize", llama, "-o", tmp_path / "out", f"--max-shard-size={size}")


def test_weights_that_the_model_does_not_know(refused, tiny, tmp_path):
    """Qwen3's norms of queries and keys, declared to be a Llama's: transformers alone would drop them."""
    folder = Path(shutil.copytree(tiny("qwen3"), tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    line = refused("quantize", folder, "-o", tmp_path / "out")
    assert line == f"{folder}: model.layers.0.self_attn.k_norm.weight belongs to no llama of transformers"


def test_a_block_with_parts_that_have_no_entry(refused, tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(ARCHITECTURES, "qwen3", ARCHITECTURES["llama"])
    line = refused("quantize", tiny("qwen3"), "-o", tmp_path / "out")
    assert line == "model.layers.0.self_attn.q_norm: not known in a block of 'qwen3'"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"hidden_size_per_layer_input": 16},
            "model.layers.0.per_layer_input_gate: not known in a block of 'gemma4_text'",
        ),
        (
            {"num_kv_shared_layers": 1, "layer_types": ["sliding_attention"] * 2, "attention_k_eq_v": False},
            "num_kv_shared_layers: blocks that take the keys and values of others are not supported",
        ),
    ],
    ids=["inputs of each layer", "shared keys"],
)
def test_a_variant_that_has_no_entry(changes, message, refused, tiny, tmp_path):
    assert refused("quantize", tiny("gemma4_text", **changes), "-o", tmp_path / "out") == message
