"""What people do with any model in vLLM, done with a quantized one: it works, or one clear line says why not.

All engines run in one process, after one another; a second one, without the plugin, serves models of other methods.
"""

import json
import re
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from requant import api
from requant.aweq.settings import Activations
from requant.recipe import Override, Recipe
from requant_kernels.scheme import WeightScheme
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PreTrainedModel

from tests.vllm_requant.bystanders import bystanders
from tests.vllm_requant.checkpoints import decoded
from tests.vllm_requant.engine import run_jobs

pytestmark = pytest.mark.server

FOUR_BITS = WeightScheme(4, 64, symmetric=False)
# Packed, decoded and int8 layers, all in one model.
MIXED = Recipe(
    FOUR_BITS,
    outliers=0.005,
    overrides={
        r".*layers\.1\..*": Override(activations=Activations(mode="dynamic")),
        r".*layers\.2\.mlp\.down_proj": Override(WeightScheme(3, 128)),
    },
)
# A difference in the last bit of an input can make its int8 code another one.
ROUNDED = 0.05
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["Anne", "Elizabeth"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
CHUNK, BLOCK = 16, 32  # tokens a step, tokens that the prefix cache keeps together
LENGTH = 24  # of answers
ADAPTED = ("self_attn.q_proj", "mlp.down_proj")
RANK, ALPHA = 8, 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("features")


@pytest.fixture(scope="module")
def mixed(folder, micro_llama) -> Path:
    api.quantize(micro_llama, folder / "mixed", MIXED)
    return folder / "mixed"


@pytest.fixture(scope="module")
def uniform(folder, micro_llama) -> Path:
    api.quantize(micro_llama, folder / "uniform", Recipe(FOUR_BITS, outliers=0.005))
    return folder / "uniform"


@pytest.fixture(scope="module")
def prompts(micro_llama, persuasion) -> list[list[int]]:
    tokens = AutoTokenizer.from_pretrained(micro_llama)(persuasion.read_text(), add_special_tokens=False).input_ids
    return [tokens[:70], tokens[300:340]]  # two whole blocks, and one


@pytest.fixture(scope="module")
def model(folder, mixed) -> PreTrainedModel:
    return decoded(mixed, folder / "mixed decoded")


@pytest.fixture(scope="module")
def adapter(folder, model) -> Path:
    """A random LoRA."""
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, module in model.named_modules():
        if name.endswith(ADAPTED):
            sizes = {"lora_A": (RANK, module.in_features), "lora_B": (module.out_features, RANK)}
            for part, size in sizes.items():
                tensors[f"base_model.model.{name}.{part}.weight"] = 0.05 * torch.randn(size, generator=generator)
    targets = [name.rpartition(".")[2] for name in ADAPTED]
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": targets, "bias": "none"}
    out = folder / "adapter"
    out.mkdir()
    (out / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, out / "adapter_model.safetensors")
    return out


@pytest.fixture(scope="module")
def others(folder) -> dict[str, dict]:
    """Jobs that have nothing to do with us."""
    common = {"dtype": "bfloat16", "enforce_eager": True, "prompts": [[5 + 7 * i % 300 for i in range(20)]]}
    turns = [{"ask": "methods"}, {}]
    return {kind: common | {"model": path, "turns": turns} for kind, path in bystanders(folder).items()}


@pytest.fixture(scope="module")
def served(  # noqa: PLR0917
    folder, mixed, uniform, model, adapter, prompts, others
) -> dict[str, Any]:
    common = {"model": mixed, "dtype": "float32", "enforce_eager": True, "prompts": prompts}
    text = common | {"skip_tokenizer_init": False}
    online = {"quantization_config": {"linear": "fp8_per_channel"}}
    # where log-probabilities of a prompt are wanted, vLLM looks for none of it in the cache
    answer = {"max_tokens": LENGTH, "prompt_logprobs": None, "logprobs": 0}
    short = {"prompt_logprobs": None, "logprobs": -1}
    jobs = {
        "structured": text
        | {"structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True}}
        | {"turns": [{"schema": SCHEMA, "detokenize": True, "max_tokens": 40}, {"ask": "reload"}]},
        "chunks": common
        | {"max_num_batched_tokens": CHUNK, "block_size": BLOCK}
        | {"turns": [{"max_tokens": LENGTH, "logprobs": 0}, answer]},
        # with adapters, vLLM's CPU backend has no log-probabilities of prompts
        "adapter": common
        | {"enable_lora": True, "max_lora_rank": RANK}
        | {"turns": [short, short | {"adapter": str(adapter)}]},
        "embed": text | {"runner": "pooling", "convert": "embed", "turns": [{"ask": "embed"}]},
        "float16": common | {"dtype": "float16"},
        "online": common | online | {"model": uniform, "turns": [{"ask": "methods"}, {}]},
        "online on int8": common | online,
        "sleep": common | {"enable_sleep_mode": True},
    }
    jobs |= others
    # last: on a CPU, vLLM can start no other engine in the process after it
    jobs["guessing"] = common | {
        "disable_log_stats": False,
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3},
        "turns": [answer, {"ask": "metrics"}],
    }
    return dict(zip(jobs, run_jobs(list(jobs.values()), folder / "with"), strict=True))


def logprobs(model: PreTrainedModel, prompts: list[list[int]]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1) for prompt in prompts]


def assert_close(answer: dict, wanted: list[torch.Tensor], atol: float) -> None:
    for found, expected in zip(answer["logprobs"], wanted, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def test_structured_output(served):
    for text in served["structured"][0]["text"]:
        answer = json.loads(text)
        assert answer.keys() == {"name", "age"}
        assert answer["name"] in SCHEMA["properties"]["name"]["enum"]
        assert 0 <= answer["age"] <= 99


def test_a_prompt_in_chunks_says_what_transformers_says(served, model, prompts):
    assert_close(served["chunks"][0], logprobs(model, prompts), ROUNDED)


def test_a_cached_prefix_changes_nothing(served, prompts):
    first, again = served["chunks"]
    assert first["cached"] == [0, 0]
    assert again["cached"] == [len(prompt) // BLOCK * BLOCK for prompt in prompts]
    assert again["generated"] == first["generated"]
    for found, expected in zip(again["generated_logprobs"], first["generated_logprobs"], strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDED)


def test_guessed_tokens_change_nothing(served):
    answer, metrics = served["guessing"]
    assert answer["generated"] == served["chunks"][0]["generated"]
    assert metrics["vllm:spec_decode_num_accepted_tokens"] > 0


def with_adapter(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    model, tensors = deepcopy(model), load_file(folder / "adapter_model.safetensors")
    for name, module in model.named_modules():
        if name.endswith(ADAPTED):
            down, up = (tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
            module.forward = partial(adapted, module.forward, ALPHA / RANK * up @ down)
    return model


def adapted(forward, change, x):
    return forward(x) + torch.nn.functional.linear(x, change)


def test_lora(served, model, adapter, prompts):
    changed = with_adapter(model, adapter)
    for answer, one, other in zip(served["adapter"], (model, changed), (changed, model), strict=True):
        for prompt, tokens, found in zip(prompts, answer["generated"], answer["generated_logprobs"], strict=True):
            text = torch.tensor([prompt + tokens])
            with torch.no_grad():
                wanted, others = (m(text).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for m in (one, other))
            torch.testing.assert_close(found, wanted, rtol=0, atol=ROUNDED)
            assert float((found - others).abs().mean()) > ROUNDED


def test_embeddings(served, model, prompts):
    [answer] = served["embed"]
    with torch.no_grad():
        hidden = torch.stack([model.model(torch.tensor([prompt])).last_hidden_state[0, -1] for prompt in prompts])
    wanted = torch.nn.functional.normalize(hidden, dim=-1)
    torch.testing.assert_close(answer["embeddings"], wanted, rtol=0, atol=5e-3)


def test_float16(served, model, prompts):
    assert_close(served["float16"], logprobs(model, prompts), 2 * ROUNDED)


def test_online_quantization_starts_from_the_decoded_weights(served, folder, uniform, prompts):
    methods, answer = served["online"]
    assert "Fp8PtpcOnlineLinearMethod" in methods["methods"].values()
    wanted = logprobs(decoded(uniform, folder / "uniform decoded"), prompts)
    for found, expected in zip(answer["logprobs"], wanted, strict=True):
        assert 1e-3 < float((found - expected).abs().mean()) < 0.2  # eight bits lose something, but not much


def test_online_quantization_of_int8_layers_is_refused(served):
    refused = r"layers\.1\.\S+: has rounded inputs, which vLLM's online quantization would drop; name the layer under"
    assert re.search(refused, served["online on int8"].get("error", "it was served"))


def test_a_reload_is_refused(served):
    refused = r"layers\.0\.\S+: a quantized layer that is served can not be reloaded; start vLLM anew"
    assert re.search(refused, served["structured"][1].get("error", "it was done"))


def test_vllm_itself_refuses_sleep_on_a_cpu(served):
    assert "Sleep mode is not supported on current platform" in served["sleep"].get("error", "it sleeps")


def test_other_models_are_served_as_if_we_were_not_there(served, others, folder):
    without = dict(zip(others, run_jobs(list(others.values()), folder / "without", VLLM_PLUGINS=""), strict=True))
    for kind in others:
        (ours, with_us), (theirs, without_us) = served[kind], without[kind]
        assert (ours.pop("requant"), theirs.pop("requant")) == (True, False)
        assert ours == theirs
        assert with_us["generated"] == without_us["generated"]
        for one, other in zip(with_us["logprobs"], without_us["logprobs"], strict=True):
            assert torch.isfinite(one).all()
            assert torch.equal(one, other)
