"""transformers itself loads a checkpoint once requant.hf is imported."""

import pytest
import requant.hf
import torch
from requant import api
from requant_kernels.errors import CheckpointError
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


def test_a_checkpoint_that_is_not_one_is_refused(llama):
    with pytest.raises(CheckpointError, match="no quantization_config"):
        api.load_quantized(llama)
