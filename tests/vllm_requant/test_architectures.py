"""Every architecture that `requant quantize` knows is served, by vLLM's own model or by way of transformers."""

from pathlib import Path

import pytest
from requant import api
from requant.architectures import ARCHITECTURES
from requant.recipe import Recipe
from requant_kernels.scheme import WeightScheme
from transformers import AutoConfig

from tests.vllm_requant.checkpoints import random_of
from tests.vllm_requant.engine import run_jobs
from tests.vllm_requant.test_serving import PROMPTS, assert_equal, logprobs

TIED = ("gemma", "gemma2", "gemma3_text", "cohere", "cohere2")
SIZES = {
    "hidden_size": 192,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 384,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "ffn_dim": 384,  # these two are OPT's
    "word_embed_proj_dim": 192,
    # of experts
    "moe_intermediate_size": 320,
    "num_experts_per_tok": 2,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}
OWN = {"qwen2_moe": {"shared_expert_intermediate_size": 192}}  # which vLLM reads of any Qwen model
# vLLM keeps the parameters of its activation in bfloat16, whatever the model's dtype.
ATOL = {"apertus": 2e-3}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("architectures")
    recipe = Recipe(WeightScheme(4, 64, symmetric=False), outliers=0.01)
    for kind in ARCHITECTURES:
        config = AutoConfig.for_model(kind, **SIZES, **OWN.get(kind, {}), tie_word_embeddings=kind in TIED)
        api.quantize(random_of(config, folder / f"{kind} original"), folder / kind, recipe)
    return {kind: folder / kind for kind in ARCHITECTURES}


@pytest.fixture(scope="module")
def served(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    common = {"enforce_eager": True, "prompts": PROMPTS, "dtype": "float32"}
    jobs = [common | {"model": path} for path in checkpoints.values()]
    return dict(zip(ARCHITECTURES, run_jobs(jobs, tmp_path_factory.mktemp("served") / "one rank"), strict=True))


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_it_is_served(kind: str, served: dict[str, dict], checkpoints: dict[str, Path]) -> None:
    assert_equal(served[kind], logprobs(api.load_quantized(checkpoints[kind])), atol=ATOL.get(kind, 1e-5))
