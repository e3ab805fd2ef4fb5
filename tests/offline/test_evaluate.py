"""Perplexity: the definition, the protocol, the published figures, and texts that can not be used."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from requant import api
from requant.cli import main
from requant.errors import InputError
from requant.perplexity import perplexity, windows
from requant.texts import read_text
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


def test_it_is_the_mean_over_the_targets_of_every_window(llama):
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    ids = torch.arange(1, 41)
    total, targets = 0.0, 0
    for start in (0, 12, 24):
        window = ids[start : start + 12]
        for position in range(1, 12):
            logits = model(window[None, :position]).logits[0, -1].double()
            total -= float(logits.detach().log_softmax(0)[window[position]])
            targets += 1
    assert perplexity(model, windows(ids, 12)) == pytest.approx(math.exp(total / targets), rel=1e-5)


@pytest.mark.parametrize(("tokens", "count"), [(None, 10), (95, 9), (10, 1), (1000, 10)])
def test_what_does_not_fill_a_window_is_dropped(tokens, count):
    assert windows(torch.arange(107), 10, tokens).tolist() == torch.arange(10 * count).view(count, 10).tolist()


@pytest.mark.parametrize(
    ("seqlen", "tokens", "message"),
    [(1, None, "at least 2 tokens"), (101, None, "100 tokens: too few"), (10, 9, "limited to 9: too few")],
)
def test_windows_that_can_not_be_filled(seqlen, tokens, message):
    with pytest.raises(InputError, match=message):
        windows(torch.arange(100), seqlen, tokens)


def test_a_model_whose_loss_is_not_finite(llama):
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(InputError, match="loss is nan in window 1"):
        perplexity(model, windows(torch.arange(20), 10))


def test_the_published_figure_of_the_fixture(micro_llama, persuasion):
    result = api.evaluate(micro_llama, persuasion, seqlen=256, tokens=32768)
    assert result.perplexity == pytest.approx(53.14, abs=0.01)
    assert (result.windows, result.tokens, result.dtype) == (128, 32768, "float32")
    assert result.special_tokens == "no special tokens (the tokenizer's own rule adds none)"
    assert "128 non-overlapping windows of 256 = 32768 tokens, 255 targets each" in result.protocol


@pytest.fixture(scope="module")
def micro_w4(micro_llama, tmp_path_factory) -> Path:
    """4 bit, group 128, round to nearest."""
    out = tmp_path_factory.mktemp("micro") / "w4"
    assert main(["quantize", str(micro_llama), "-o", str(out), "--group-size", "128"]) == 0
    return out


def test_round_to_nearest_costs_what_the_peers_measured(micro_w4, persuasion):
    result = api.evaluate(micro_w4, persuasion, seqlen=256, tokens=32768)
    assert result.perplexity == pytest.approx(53.94, abs=0.05)


def test_a_tampered_checkpoint_is_refused_by_name(micro_w4, persuasion, tmp_path, capsys):
    bad = Path(shutil.copytree(micro_w4, tmp_path / "bad"))
    tensors = load_file(bad / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight_scale"][3, 0] = float("nan")
    save_file(tensors, bad / "model.safetensors")
    assert main(["eval", str(bad), "--text", str(persuasion), "--seqlen", "64"]) == 1
    printed = capsys.readouterr()
    assert printed.err == "error: model.safetensors: model.layers.2.mlp.up_proj.weight_scale: not finite\n"
    assert printed.out == ""


def test_a_window_longer_than_the_context(micro_llama, persuasion):
    with pytest.raises(InputError, match="seqlen 4096: the model's context is 2048 tokens"):
        api.evaluate(micro_llama, persuasion, seqlen=4096)


def test_the_command_prints_the_figure_with_its_protocol(micro_llama, persuasion, capsys):
    arguments = ["eval", str(micro_llama), "--text", str(persuasion), "--seqlen", "64", "--tokens", "256"]
    assert main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["windows"] == 4
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"perplexity {result['perplexity']:.4f}\n{result['protocol']}\n"


def test_a_tokenizer_that_would_add_a_token_is_told(micro_llama, persuasion, tmp_path):
    """The figure is that of the plain text; the protocol says what the tokenizer would have done."""
    model = tmp_path / "model"
    model.mkdir()
    for path in micro_llama.iterdir():
        if path.name != "tokenizer.json":
            (model / path.name).symlink_to(path)
    tokenizer = json.loads((micro_llama / "tokenizer.json").read_text())
    first = min(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": first, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {first: {"id": first, "ids": [0], "tokens": [first]}},
    }
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    result = api.evaluate(model, persuasion, seqlen=64, tokens=64)
    assert result.special_tokens == f"no special tokens (the tokenizer's own rule would add {first})"
    assert result.perplexity == api.evaluate(micro_llama, persuasion, seqlen=64, tokens=64).perplexity


@pytest.mark.parametrize(
    ("content", "message"), [(b"\xff\xfe", r"not UTF-8 \(byte 0\)"), (None, r"can not be read \(No such file")]
)
def test_texts_that_can_not_be_used(content, message, tmp_path):
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_text(path)


def test_line_ends_do_not_matter(tmp_path):
    (tmp_path / "dos").write_bytes(b"a\r\nb\r\n")
    assert read_text(tmp_path / "dos").content == "a\nb\n"


def test_wikitext2_without_the_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(InputError, match=r"needs the package datasets \(pip install 'vllm-requant\[hub\]'\)"):
        read_text("wikitext2")
