"""`requant quantize` on every architecture: what is written is what was meant, whole, and the same every time."""

import json
from pathlib import Path

import pytest
import torch
from requant import api
from requant.architectures import ARCHITECTURES
from requant.detach import outliers
from requant.pipeline import REPORT_FILE
from requant.recipe import Recipe
from requant_kernels.reference import dequantize
from requant_kernels.rounding import rtn
from requant_kernels.rounding.dense import attach_residual
from requant_kernels.scheme import WeightScheme
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

W4 = Recipe(WeightScheme(4, 32, symmetric=False))
SPARSE = Recipe(WeightScheme(3, 64), outliers=0.01)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("recipe", [W4, SPARSE], ids=["w4-asym", "w3-sparse"])
@pytest.mark.parametrize("model_type", [name for name, one in ARCHITECTURES.items() if not one.experts])
def test_every_layer_decodes_to_what_the_quantizer_chose(model_type, recipe, tiny, tmp_path):
    source = tiny(model_type)
    report = api.quantize(source, tmp_path / "out", recipe)
    assert api.check(tmp_path / "out") == []
    original = AutoModelForCausalLM.from_pretrained(source)
    loaded = api.load_quantized(tmp_path / "out")
    quantized = {row.name for row in report.layers if row.scheme}
    blocks = [f"{ARCHITECTURES[model_type].blocks}.{block}" for block in range(2)]
    present = {name for name, _ in original.named_modules()}
    assert quantized == {f"{block}.{name}" for block in blocks for name in ARCHITECTURES[model_type].linears} & present
    assert {name.removeprefix(f"{block}.") for name in quantized for block in blocks if name.startswith(block)} == set(
        ARCHITECTURES[model_type].linears
    )
    for name, parameter in original.named_parameters():
        got = loaded.get_parameter(name)
        if name.removesuffix(".weight") not in quantized:
            assert torch.equal(got, parameter.float()), name
            continue
        target = parameter.detach().float()
        mask = outliers.largest(target, recipe.outliers)
        dense = rtn.quantize(target, recipe.weights, dtype=torch.bfloat16, excluded=mask)
        assert torch.equal(got, dequantize(attach_residual(target, dense, mask, torch.bfloat16))), name
    assert torch.isfinite(loaded(torch.tensor([[1, 2, 3]])).logits).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_dtype_is_kept(dtype, tiny, tmp_path):
    api.quantize(tiny("llama", dtype=dtype), tmp_path / "out", SPARSE)
    floats = {tensor.dtype for tensor in tensors_of(tmp_path / "out").values() if tensor.is_floating_point()}
    assert floats == {dtype}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [-1, 32, 64])
def test_the_report_counts_every_stored_bit(bits, group, llama, tmp_path):
    report = api.quantize(llama, tmp_path / "out", Recipe(WeightScheme(bits, group, False), outliers=0.01))
    tensors = tensors_of(tmp_path / "out")
    for row in report.layers[:-1]:
        stored = sum(tensor.nbytes for name, tensor in tensors.items() if name.startswith(f"{row.name}."))
        assert row.bits_per_weight == 8 * stored / row.numel
        assert row.nnz == round(0.01 * row.numel)
    assert report.total.checkpoint_bytes == sum(tensor.nbytes for tensor in tensors.values())
    rows, total = api.inspect(tmp_path / "out")
    assert total == report.total
    assert [row.bytes for row in rows] == [row.bytes for row in report.layers]


def test_every_linear_layer_is_listed_with_the_reason_where_it_was_skipped(llama, tmp_path):
    recipe = Recipe(WeightScheme(4, 32), ignore=(r"model\.layers\.0\..*",))
    api.quantize(llama, tmp_path / "out", recipe)
    layers = json.loads((tmp_path / "out" / REPORT_FILE).read_text())["layers"]
    original = AutoModelForCausalLM.from_pretrained(llama)
    linears = [name for name, module in original.named_modules() if isinstance(module, torch.nn.Linear)]
    assert [row["name"] for row in layers] == linears
    reasons = {row["name"]: row["reason"] for row in layers if row["scheme"] is None}
    assert reasons == dict.fromkeys(linears[:7], "ignored by the recipe") | {"lm_head": "output head"}
    assert api.check(tmp_path / "out") == []


def test_a_tied_embedding_is_written_once(tiny, tmp_path):
    report = api.quantize(tiny("llama", tie_word_embeddings=True), tmp_path / "out", W4)
    assert "lm_head.weight" not in tensors_of(tmp_path / "out")
    assert report.layers[-1].reason == "output head, tied to model.embed_tokens"
    loaded = api.load_quantized(tmp_path / "out")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_shards_are_cut_below_the_limit_and_indexed(quantized):
    shards = sorted(quantized.glob("*.safetensors"))
    assert len(shards) > 2
    assert all(sum(tensor.nbytes for tensor in load_file(shard).values()) <= 40_000 for shard in shards)
    index = json.loads((quantized / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors_of(quantized).values())
    for name, file in index["weight_map"].items():
        with safe_open(quantized / file, "pt") as opened:
            assert name in opened.keys()  # noqa: SIM118


def test_the_folder_is_complete(micro_llama, tmp_path):
    out = tmp_path / "out"
    api.quantize(micro_llama, out, "w4-sparse")
    names = {path.name for path in out.iterdir()}
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert names == tokenizer | {"config.json", "model.safetensors", "README.md", REPORT_FILE}
    for name in tokenizer:
        assert (out / name).read_bytes() == (micro_llama / name).read_bytes()
    config = json.loads((out / "config.json").read_text())
    scheme = config.pop("quantization_config")
    assert config == json.loads((micro_llama / "config.json").read_text())
    assert (scheme["quant_method"], scheme["version"], scheme["ignore"]) == ("requant", 1, ["lm_head"])
    card = (out / "README.md").read_text()
    assert card.startswith("---\nbase_model: micro-llama-en\n")
    assert "| sparse entries | 0.50 % |" in card
    assert "outliers: 0.005" in card


def test_the_licence_of_the_original_is_carried_over(llama, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for path in llama.iterdir():
        (source / path.name).symlink_to(path)
    (source / "README.md").write_text("---\nlicense: apache-2.0\ntags: [x]\n---\n# Model\n")
    api.quantize(source, tmp_path / "out", W4)
    assert "\nlicense: apache-2.0\n" in (tmp_path / "out" / "README.md").read_text()


def test_the_same_input_gives_the_same_bytes(llama, quantized, tmp_path):
    recipe = Recipe(WeightScheme(4, 32, symmetric=False), outliers=0.02)
    api.quantize(llama, tmp_path / "again", recipe, max_shard_size="40KB")
    assert bytes_of(tmp_path / "again") == bytes_of(quantized)
