"""Tiny random models of every supported architecture, and the checkpoints made from them once a session."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from requant import api
from requant.recipe import Recipe
from requant_kernels.scheme import WeightScheme
from transformers import AutoConfig, AutoModelForCausalLM

from tests.configurations import CONVOLVED, KEYS_AS_VALUES, granite_hybrid, linear_attention, state_space

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "ffn_dim": 128,  # these two are OPT's
    "word_embed_proj_dim": 64,
}
OWN = {
    **dict.fromkeys(("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"), linear_attention(16)),
    "gemma4_text": KEYS_AS_VALUES,
    **dict.fromkeys(("lfm2", "lfm2_moe"), CONVOLVED),
    "granitemoehybrid": granite_hybrid(128, 128),
    "falcon_h1": state_space(128),
}


@pytest.fixture(autouse=True, scope="session")
def quiet():
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Callable[..., Path]:
    """tiny("qwen2", tie_word_embeddings=True) -> the folder of a random bf16 model."""

    def make(model_type: str = "llama", dtype: torch.dtype = torch.bfloat16, **changes: object) -> Path:
        folder = tmp_path_factory.mktemp("models") / model_type
        torch.manual_seed(0)
        config = AutoConfig.for_model(model_type, **SMALL | OWN.get(model_type, {}) | changes)
        AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def words(monkeypatch):
    """Tiny models have no tokenizer: a letter is a token."""

    class Tokenizer:
        def __call__(self, text, **_):
            ids = [1 + ord(letter) % 90 for letter in text[:40000]]
            return type("Encoding", (), {"input_ids": ids})

    monkeypatch.setattr("requant.sources.Source.tokenizer", lambda _: Tokenizer())


@pytest.fixture(scope="session")
def llama(tiny) -> Path:
    """An untied tiny Llama; never written to."""
    return tiny("llama")


@pytest.fixture(scope="session")
def quantized(llama, tmp_path_factory) -> Path:
    """Its checkpoint: 4 bit, group 32, asymmetric, 2 % sparse, in several shards; never written to."""
    out = tmp_path_factory.mktemp("checkpoints") / "llama-w4"
    recipe = Recipe(WeightScheme(4, 32, symmetric=False), outliers=0.02)
    api.quantize(llama, out, recipe, max_shard_size="40KB")
    return out


@pytest.fixture
def checkpoint(quantized, tmp_path) -> Path:
    """A copy of it to tamper with."""
    return Path(shutil.copytree(quantized, tmp_path / "checkpoint"))
