"""Every architecture that `requant quantize` knows is served, by vLLM's own model or by way of transformers."""

from pathlib import Path

import pytest
import torch
from requant import api
from requant.architectures import ARCHITECTURES
from requant.recipe import Recipe
from requant.tuning.distillation import final_state, logits
from requant_kernels.scheme import WeightScheme
from transformers import AutoConfig

from tests.configurations import CONVOLVED, KEYS_AS_VALUES, granite_hybrid, linear_attention, state_space
from tests.vllm_requant.checkpoints import random_of
from tests.vllm_requant.engine import run_jobs
from tests.vllm_requant.test_serving import PROMPTS, assert_equal, logprobs

TIED = ("gemma", "gemma2", "gemma3_text", "gemma4_text", "cohere", "cohere2", "lfm2", "lfm2_moe")
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
# vLLM's kernel for CPUs knows only heads of 512 + 64.
_LATENT = {
    "q_lora_rank": 128,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "num_key_value_heads": 6,
}
_BIASED_ROUTER = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
_LINEAR = linear_attention(64) | {"shared_expert_intermediate_size": 192}
_WITH_LINEAR = ("qwen3_5_text", "qwen3_next", "qwen3_5_moe_text")
_LFM2 = CONVOLVED | dict.fromkeys(("block_dim", "conv_dim"), 192)  # as the hub's files have them, and vLLM wants
OWN = {
    "gemma4_text": KEYS_AS_VALUES | {"num_experts": None, "enable_moe_block": False},
    **dict.fromkeys(_WITH_LINEAR, _LINEAR),
    "qwen2_moe": {"shared_expert_intermediate_size": 192},  # which vLLM reads of any Qwen model
    "phimoe": {"attention_bias": True},  # as vLLM has it, whatever the configuration says
    "hunyuan_v1_moe": {"moe_intermediate_size": 384},
    "lfm2": _LFM2,
    "lfm2_moe": _LFM2 | {"num_dense_layers": 1},
    "granitemoehybrid": granite_hybrid(384, 384),
    "falcon_h1": state_space(384),
    "flex_olmo": {"moe_intermediate_size": 384, "n_group": None, "topk_group": None},
    "deepseek_v2": _LATENT | {"q_lora_rank": None, "topk_method": "group_limited_greedy"},
    "deepseek_v3": _LATENT | _BIASED_ROUTER,
    # transformers has this epsilon in the norms inside attention, whatever the configuration says
    "glm4_moe_lite": _LATENT | _BIASED_ROUTER | {"rms_norm_eps": 1e-6},
}
# vLLM's operator for CPUs, which it takes only where it compiles nothing, takes heads for adjacent that here are not.
_OTHER_ROTARY = {"compilation_config": {"custom_ops": ["-rotary_embedding"]}}
SERVED = {
    **{key: {"dtype": "bfloat16"} for key in _WITH_LINEAR},  # vLLM has no other for linear attention on CPUs
    "phimoe": {"hf_overrides": {"architectures": ["PhiMoEForCausalLM"]}},  # as the hub's files call it
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "lfm2", "lfm2_moe"), _OTHER_ROTARY),
}
# vLLM keeps the parameters of its activation in bfloat16, whatever the model's dtype. In bfloat16 they are off by 0.007
# unquantized, and by 0.009 quantized.
ATOL = {"apertus": 2e-3, "gemma4_text": 3e-5, **dict.fromkeys(_WITH_LINEAR, 0.015)}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("architectures")
    recipe = Recipe(WeightScheme(4, 64, symmetric=False), outliers=0.01)
    for kind in ARCHITECTURES:
        config = AutoConfig.for_model(kind, **SIZES | OWN.get(kind, {}), tie_word_embeddings=kind in TIED)
        api.quantize(random_of(config, folder / f"{kind} original"), folder / kind, recipe)
    return {kind: folder / kind for kind in ARCHITECTURES}


@pytest.fixture(scope="module")
def served(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    common = {"enforce_eager": True, "prompts": PROMPTS, "dtype": "float32"}
    jobs = [common | {"model": path} | SERVED.get(kind, {}) for kind, path in checkpoints.items()]
    return dict(zip(ARCHITECTURES, run_jobs(jobs, tmp_path_factory.mktemp("served") / "one rank"), strict=True))


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_it_is_served(kind: str, served: dict[str, dict], checkpoints: dict[str, Path]) -> None:
    assert_equal(served[kind], logprobs(api.load_quantized(checkpoints[kind])), atol=ATOL.get(kind, 1e-5))


def test_two_ranks_share_state_space_layers(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Of one group, which both ranks have, and in whose input layer it lies between what they share."""
    folder = checkpoints["granitemoehybrid"]
    job = {"enforce_eager": True, "prompts": PROMPTS, "dtype": "float32", "tensor_parallel_size": 2, "model": folder}
    [found] = run_jobs([job], tmp_path / "two ranks")
    assert_equal(found, logprobs(api.load_quantized(folder)), atol=1e-5)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_distillation_knows_its_logits(kind: str, checkpoints: dict[str, Path]) -> None:
    model, ids = api.load_quantized(checkpoints[kind]), torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        torch.testing.assert_close(logits(model, final_state(model, ids)), model(input_ids=ids).logits)
