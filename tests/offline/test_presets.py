"""The presets of `--method requant` from the command line to perplexity on held-out prose."""

import pytest
from requant import api
from requant.cli import main

FEW = ("--samples", "8", "--seqlen", "256")
GAIN = {"4": 0.3, "3": 0.5, "2": 0.7}  # of what rounding to nearest loses in perplexity


@pytest.mark.parametrize("bits", GAIN)
def test_they_lose_far_less_than_nearest(micro_llama, persuasion, tmp_path, bits):
    def perplexity(model):
        return api.evaluate(model, persuasion, seqlen=256, tokens=8192).perplexity

    def quantized(name, *options):
        assert main(["quantize", str(micro_llama), "-o", str(tmp_path / name), "--bits", bits, *options]) == 0
        return tmp_path / name

    nearest = quantized("nearest", "--method", "rtn", "--group-size", "64")
    made = quantized("requant", "--method", "requant", *FEW)
    assert api.check(made) == []
    original = perplexity(micro_llama)
    assert perplexity(made) - original < (1 - GAIN[bits]) * (perplexity(nearest) - original)
