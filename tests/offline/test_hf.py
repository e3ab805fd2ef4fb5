"""transformers itself loads a checkpoint once requant.hf is imported."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import requant.hf
import torch
from requant import api
from requant.stored import Defect
from requant.validation import defects
from requant_kernels.errors import CheckpointError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


def test_from_pretrained_gives_the_decoded_model(quantized):
    model = AutoModelForCausalLM.from_pretrained(quantized)
    exact = requant.hf.load_quantized(quantized)
    assert model.dtype == torch.bfloat16
    for name, parameter in exact.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter.to(torch.bfloat16)), name


def test_the_loaded_model_is_an_ordinary_one(quantized, tmp_path):
    model = api.load_quantized(quantized)
    model.save_pretrained(tmp_path / "dense")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert not hasattr(again.config, "quantization_config")
    for name, parameter in model.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter), name


def test_a_checkpoint_is_checked_once_whoever_loads_it(quantized, monkeypatch):
    checked = []

    def counting(folder: Path) -> Iterator[Defect]:
        checked.append(folder)
        return defects(folder)

    monkeypatch.setattr(requant.hf, "defects", counting)
    api.load_quantized(quantized)
    AutoModelForCausalLM.from_pretrained(quantized)  # not that what was sound once is taken to be so for ever
    assert checked == [quantized, quantized]


def test_transformers_refuses_a_defect_of_contents_before_it_loads(checkpoint):
    file = sorted(checkpoint.glob("*.safetensors"))[-1]
    tensors = load_file(file)
    tensors["model.layers.1.mlp.down_proj.weight_scale"][0, 0] = -1
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"down_proj\.weight_scale: not positive"):
        AutoModelForCausalLM.from_pretrained(checkpoint)


def test_a_checkpoint_that_is_not_one_is_refused(llama):
    with pytest.raises(CheckpointError, match="no quantization_config"):
        api.load_quantized(llama)
