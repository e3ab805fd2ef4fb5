"""The whole line with rounded inputs: one checkpoint that mixes all kinds of layers, made, checked, served."""

import pytest
from openai import OpenAI
from requant.server import serve

from tests.e2e.conftest import requant
from tests.e2e.test_serve import SERVE, assert_perplexities_agree

pytestmark = pytest.mark.server

RECIPE = r"""
weights: {bits: 8}
activations: {mode: static, symmetric: false}
equalization: {range: minmax, alpha: 0.5}
bias_correction: true
significant: 0.5%
calibration: {samples: 8, seqlen: 128}
overrides:
  '.*self_attn\..*': {activations: {mode: dynamic}}
  '.*layers\.1\.mlp\..*': {weights: {bits: 4, group_size: 64, symmetric: false}}
ignore: ['.*layers\.2\.mlp\.down_proj']
"""


def test_a_mixed_checkpoint_is_served_as_it_is_evaluated(micro_llama, persuasion, tmp_path):
    recipe, checkpoint = tmp_path / "recipe.yaml", tmp_path / "mixed"
    recipe.write_text(RECIPE)
    assert "bias correction kept in" in requant("quantize", micro_llama, "-o", checkpoint, "--recipe", recipe)
    assert "sound" in requant("check", checkpoint)
    table = requant("inspect", checkpoint)
    for kind in ("w8a8 static", "w8a8 dynamic", "w4 g64 asym + sparse", "as it was: ignored by the recipe"):
        assert kind in table
    settings = ("--dtype", "float32", "--served-model-name", "micro", *SERVE)
    with serve(checkpoint, *settings, log=tmp_path / "log") as server:
        assert_perplexities_agree(OpenAI(base_url=f"{server.url}/v1", api_key="none"), checkpoint, persuasion)
