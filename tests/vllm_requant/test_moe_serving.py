"""Whole mixture-of-experts models in vLLM: their log-probabilities are those of transformers on the decoded weights."""

import re
from pathlib import Path

import pytest
import torch
from requant import api
from requant.recipe import Recipe
from requant_kernels.scheme import W8A8_WEIGHTS, ActivationScheme, CheckpointScheme, LayerScheme, WeightScheme

from tests.vllm_requant.checkpoints import EXPERT_CONFIGS, decoded, edit, quantize, random_model
from tests.vllm_requant.engine import run_jobs
from tests.vllm_requant.test_serving import PROMPTS, ROUNDED, assert_equal, drop, layer, logprobs, put

pytestmark = pytest.mark.server

AS_THEY_ARE = ("lm_head", r".*\.(gate|shared_expert_gate)")
# Experts of one layer may differ in everything.
MIXED = CheckpointScheme(
    layer(4, 64, symmetric=False),
    overrides={
        r".*layers\.1\..*experts\.0\.(w1|w3|gate_proj|up_proj)": layer(3, 64, bias_correction=True),
        r".*layers\.1\..*experts\.1\.(w2|down_proj)": layer(2, -1, codebook=True, bias_correction=True),
        r".*layers\.1\..*experts\.2\..*": layer(8, -1),
    },
    ignore=AS_THEY_ARE,
)
# Ranks see all of what enters gate and up, and a part of what enters down: its step is in the file.
W8A8 = CheckpointScheme(
    LayerScheme(W8A8_WEIGHTS, None, ActivationScheme(dynamic=True)),
    overrides={
        r".*(o_proj|down_proj)": LayerScheme(W8A8_WEIGHTS, None, ActivationScheme(dynamic=False)),
        r".*experts\.1\..*": layer(4, 64),
    },
    ignore=AS_THEY_ARE,
)
# As a user makes one: experts of one block only.
RECIPE = Recipe(WeightScheme(4, 64, symmetric=False), outliers=0.01, ignore=(r".*layers\.1\.mlp\.experts\..*",))
EXPERT = "model.layers.1.block_sparse_moe.experts.2"
TAMPERED = {
    "missing tensor": (drop(f"{EXPERT}.w2.sparse_values"), f"{EXPERT}.w2.sparse_values: missing"),
    "unquantized": (put(f"{EXPERT}.w1.weight", lambda _: torch.ones(320, 192)), f"{EXPERT}.w1.weight: stored unquant"),
    "offsets": (
        put(f"{EXPERT}.w3.sparse_row_offsets", lambda t: t.flip(0)),
        f"{EXPERT}.w3.sparse_row_offsets: not mon",
    ),
    "rows": (put(f"{EXPERT}.w2.weight_packed", lambda t: t[1:]), f"{EXPERT}.w2.weight_scale: shape"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("experts")


@pytest.fixture(scope="module")
def checkpoints(folder) -> dict[str, Path]:
    sources = {kind: random_model(kind, folder / kind) for kind in EXPERT_CONFIGS}
    schemes = {
        "mixtral": ("mixtral", MIXED),
        "qwen2_moe": ("qwen2_moe", MIXED),
        "w8a8": ("qwen2_moe", W8A8),
    }
    made = {
        name: quantize(sources[kind], folder / f"quantized {name}", scheme) for name, (kind, scheme) in schemes.items()
    }
    api.quantize(sources["qwen3_moe"], folder / "qwen3", RECIPE)
    return made | {"qwen3_moe": folder / "qwen3"}


@pytest.fixture(scope="module")
def expected(folder, checkpoints) -> dict[str, list[torch.Tensor]]:
    return {name: logprobs(decoded(path, folder / f"{name} decoded")) for name, path in checkpoints.items()}


@pytest.fixture(scope="module")
def one_rank(folder, checkpoints) -> dict[str, dict]:
    common = {"enforce_eager": True, "prompts": PROMPTS, "dtype": "float32"}
    jobs = {name: common | {"model": path} for name, path in checkpoints.items()}
    jobs["dummy"] = common | {"model": checkpoints["mixtral"], "load_format": "dummy"}
    jobs["reloaded"] = common | {"model": checkpoints["mixtral"], "turns": [{"ask": "reload"}]}
    jobs["compiled"] = common | {"model": checkpoints["mixtral"], "enforce_eager": False}
    for name, (change, _) in TAMPERED.items():
        jobs[name] = common | {"model": edit(checkpoints["mixtral"], folder / name, change)}
    return dict(zip(jobs, run_jobs(list(jobs.values()), folder / "one rank"), strict=True))


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_experts_of_every_kind_in_every_model(name, one_rank, expected):
    assert_equal(one_rank[name], expected[name], atol=1e-5)


def test_int8_experts_beside_4_bit_ones(one_rank, expected):
    assert_equal(one_rank["w8a8"], expected["w8a8"], atol=ROUNDED)


def test_the_compiled_model_says_what_the_eager_one_says(one_rank):
    assert_equal(one_rank["compiled"], one_rank["mixtral"]["logprobs"], atol=1e-4)


def test_dummy_weights_are_served(one_rank):
    assert all(torch.isfinite(logprobs).all() for logprobs in one_rank["dummy"]["logprobs"])


def test_a_reload_is_refused(one_rank):
    refused = r"layers\.0\.\S+: a quantized layer that is served can not be reloaded; start vLLM anew"
    assert re.search(refused, one_rank["reloaded"][0].get("error", "it was done"))


def test_experts_as_one_layer(folder, checkpoints):
    """As on a GPU, but for the interpreter, which takes a while for each token."""
    scheme = CheckpointScheme(layer(4, 64, symmetric=False), ignore=AS_THEY_ARE)
    model = quantize(folder / "mixtral", folder / "alike", scheme)
    few = {"max_num_seqs": 2, "max_num_batched_tokens": 8, "max_model_len": 16}
    job = {"model": model, "prompts": PROMPTS[1:], "dtype": "bfloat16", "enforce_eager": True, **few}
    jobs = [job | {"interpreted_experts": True, "turns": [{"max_tokens": 1}]}]
    [[result]] = run_jobs(jobs, folder / "interpreted", TRITON_INTERPRET="1")
    [expected] = logprobs(decoded(model, folder / "alike decoded"))[1:]
    assert_equal(result, [expected], atol=0.03)
    assert "experts run as one layer" in (folder / "interpreted" / "log").read_text()


@pytest.mark.gpu
def test_graphs_record_experts(folder, checkpoints):
    scheme = CheckpointScheme(layer(4, 64, symmetric=False), ignore=AS_THEY_ARE)
    model = quantize(folder / "mixtral", folder / "recorded", scheme)
    job = {"model": model, "prompts": PROMPTS, "dtype": "bfloat16"}  # compiled, with CUDA graphs
    [result] = run_jobs([job], folder / "graphs")
    assert_equal(result, logprobs(decoded(model, folder / "recorded decoded")), atol=0.03)


@pytest.mark.parametrize("name", TAMPERED)
def test_a_tampered_expert_is_refused_by_name(name, one_rank):
    assert re.search(re.escape(TAMPERED[name][1]), one_rank[name].get("error", "it was served"))


@pytest.fixture(scope="module")
def two_ranks(folder, checkpoints) -> dict[str, dict]:
    names = ("mixtral", "w8a8")
    common = {"dtype": "float32", "enforce_eager": True, "prompts": PROMPTS, "tensor_parallel_size": 2}
    jobs = [common | {"model": checkpoints[name]} for name in names]
    return dict(zip(names, run_jobs(jobs, folder / "two ranks"), strict=True))


@pytest.mark.parametrize(("name", "atol"), [("mixtral", 1e-5), ("w8a8", ROUNDED)], ids=["mixtral", "qwen2_moe w8a8"])
def test_experts_on_two_ranks(name, atol, two_ranks, expected):
    assert_equal(two_ranks[name], expected[name], atol=atol)
