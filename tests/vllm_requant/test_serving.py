"""Whole models in vLLM: their log-probabilities are those of transformers on the decoded weights."""

import re
from pathlib import Path

import pytest
import torch
from requant_kernels.dense_sparse import int4_panels
from requant_kernels.scheme import (
    W8A8_WEIGHTS,
    ActivationScheme,
    CheckpointScheme,
    LayerScheme,
    SparseScheme,
    WeightScheme,
)

from tests.vllm_requant.checkpoints import CONFIGS, decoded, edit, quantize, random_model
from tests.vllm_requant.engine import run_jobs

pytestmark = pytest.mark.server

# A difference in the last bit of an input can make its code another one.
ROUNDED = 0.02
PROMPTS = [[5 + 7 * i % 300 for i in range(20)], [3, 1, 4, 1, 5, 9, 2, 6]]


def layer(bits: int, group_size: int, symmetric: bool = True, codebook: bool = False, **more) -> LayerScheme:
    return LayerScheme(WeightScheme(bits, group_size, symmetric, codebook), SparseScheme(), **more)


UNIFORM = CheckpointScheme(layer(4, 64, symmetric=False), ignore=("lm_head",))
# Every kind of layer somewhere, also in layers that two or three ranks cut inside a group; one fused layer ignored.
MIXED = CheckpointScheme(
    layer(4, 64, symmetric=False),
    overrides={
        r".*layers\.0\..*(down_proj|fc2)": layer(3, 128),
        r".*layers\.0\..*(o_proj|out_proj)": layer(3, 64, symmetric=False, bias_correction=True),
        r".*layers\.1\..*(gate_proj|up_proj|gate_up_proj)": layer(2, -1, codebook=True),
        r".*layers\.1\..*(down_proj|fc2)": layer(8, -1),
        r".*layers\.1\..*(o_proj|out_proj)": layer(2, 32, symmetric=False),
    },
    ignore=("lm_head", r".*layers\.0\..*(gate_proj|up_proj|gate_up_proj|fc1)"),
)


def int8(*, dynamic: bool, symmetric: bool = True, **more) -> LayerScheme:
    return LayerScheme(W8A8_WEIGHTS, None, ActivationScheme(dynamic, symmetric), **more)


# Layers whose input every rank sees whole find its step while serving; of those that see a part of it, the step is in
# the file, so that all ranks round alike. One layer of 4 bit among them.
W8A8 = CheckpointScheme(
    int8(dynamic=True),
    overrides={
        r".*layers\.0\..*(o_proj|down_proj)": int8(dynamic=False),
        r".*layers\.1\..*o_proj": int8(dynamic=False, symmetric=False, bias_correction=True),
        r".*layers\.1\..*(gate_proj|up_proj)": int8(dynamic=True, symmetric=False),
        r".*layers\.1\..*down_proj": layer(4, 64),
    },
    ignore=("lm_head",),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def mixed(folder) -> dict[str, Path]:
    return {kind: quantize(random_model(kind, folder / kind), folder / f"{kind}-mixed", MIXED) for kind in CONFIGS}


@pytest.fixture(scope="module")
def uniform(folder, mixed) -> Path:
    return quantize(folder / "llama", folder / "llama-uniform", UNIFORM)


@pytest.fixture(scope="module")
def w8a8(folder, mixed) -> Path:
    return quantize(folder / "llama", folder / "llama-w8a8", W8A8)


@pytest.fixture(scope="module")
def expected(folder, mixed, uniform, w8a8) -> dict[str, list[torch.Tensor]]:
    """Log-probabilities [tokens-1, vocabulary] of each prompt, by transformers in float32."""
    checkpoints = mixed | {"uniform": uniform, "w8a8": w8a8}
    return {name: logprobs(decoded(path, folder / f"{name} decoded")) for name, path in checkpoints.items()}


def logprobs(model: torch.nn.Module) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1) for prompt in PROMPTS]


def assert_equal(result: dict, logprobs: list[torch.Tensor], atol: float) -> None:
    assert "error" not in result, result["error"]
    for served, wanted in zip(result["logprobs"], logprobs, strict=True):
        torch.testing.assert_close(served, wanted, rtol=0, atol=atol)


# -- one rank: all of these run in one process, after one another --


def drop(name):
    return lambda tensors, config: tensors.pop(name)


def put(name, make):
    return lambda tensors, config: tensors.__setitem__(name, make(tensors.get(name)))


def declare(**changes):
    return lambda tensors, config: config["quantization_config"].update(changes)


BLOCK = "model.layers.1.self_attn"
TAMPERED = {
    "missing tensor": (drop(f"{BLOCK}.k_proj.weight_scale"), f"{BLOCK}.k_proj.weight_scale: missing"),
    "extra tensor": (put(f"{BLOCK}.o_proj.weight_codebook", lambda _: torch.ones(192, 16)), "not expected in a layer"),
    "unquantized layer": (put(f"{BLOCK}.v_proj.weight", lambda _: torch.ones(64, 192)), "stored unquantized"),
    "offsets": (put(f"{BLOCK}.q_proj.sparse_row_offsets", lambda t: t.flip(0)), "sparse_row_offsets: not monotone"),
    "dtype": (put(f"{BLOCK}.q_proj.weight_packed", lambda t: t.long()), "weight_packed: torch.int64"),
    "shape": (put(f"{BLOCK}.o_proj.weight_scale", lambda t: t[1:]), r"weight_scale: shape \[191, 3\]"),
    "scale": (put(f"{BLOCK}.o_proj.weight_scale", lambda t: -t), "weight_scale: not positive"),
    "key": (declare(shiny=1), "unknown key 'shiny'"),
    "version": (declare(version=2), "version: 2 is not 1"),
    "fused": (declare(ignore=["lm_head", r".*k_proj"]), "vLLM fuses .*q_proj and .*k_proj"),
    "output layer": (declare(ignore=[]), "lm_head: a quantized output layer can not be served"),
}


@pytest.fixture(scope="module")
def one_rank(folder, mixed, uniform, w8a8) -> dict[str, dict]:
    common = {"enforce_eager": True, "prompts": PROMPTS}
    jobs = {kind: common | {"model": path, "dtype": "float32"} for kind, path in mixed.items()}
    jobs["bfloat16"] = common | {"model": uniform, "dtype": "bfloat16"}
    jobs["by flag"] = common | {"model": uniform, "dtype": "float32", "quantization": "requant"}
    jobs["w8a8"] = common | {"model": w8a8, "dtype": "float32"}
    jobs["dummy"] = common | {"model": mixed["llama"], "dtype": "bfloat16", "load_format": "dummy"}
    for name, (change, _) in TAMPERED.items():
        bad = edit(uniform, folder / f"tampered {name}", change)
        jobs[name] = {"model": bad, "dtype": "float32", "enforce_eager": True}
    return dict(zip(jobs, run_jobs(list(jobs.values()), folder / "one rank"), strict=True))


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_kind_of_layer_in_every_kind_of_model(kind, one_rank, expected):
    assert_equal(one_rank[kind], expected[kind], atol=1e-5)


def test_the_flag_changes_nothing(one_rank, expected):
    assert_equal(one_rank["by flag"], expected["uniform"], atol=1e-5)


def test_bfloat16_is_close_and_stays_packed(one_rank, expected, folder):
    assert_equal(one_rank["bfloat16"], expected["uniform"], atol=0.03)
    if not int4_panels.unavailable():
        assert "with torch.bfloat16 on cpu run as cpu_int4" in (folder / "one rank" / "log").read_text()


def test_int8_layers_of_every_kind_beside_4_bit_ones(one_rank, expected):
    assert_equal(one_rank["w8a8"], expected["w8a8"], atol=ROUNDED)


def test_dummy_weights_are_served(one_rank):
    assert all(torch.isfinite(logprobs).all() for logprobs in one_rank["dummy"]["logprobs"])


@pytest.mark.parametrize("name", TAMPERED)
def test_a_tampered_checkpoint_is_refused_by_name(name, one_rank):
    assert re.search(TAMPERED[name][1], one_rank[name].get("error", "it was served"))


# -- several ranks, and the compiler --


@pytest.fixture(scope="module")
def ranks(folder, mixed, w8a8) -> dict[int | str, dict]:
    common = {"dtype": "float32", "enforce_eager": True, "prompts": PROMPTS}
    jobs = [
        common | {"model": mixed["llama"], "tensor_parallel_size": 2},
        # one key/value head, which all three need
        common | {"model": mixed["qwen2"], "tensor_parallel_size": 3},
        common | {"model": w8a8, "tensor_parallel_size": 2},
    ]
    return dict(zip((2, 3, "w8a8"), run_jobs(jobs, folder / "ranks"), strict=True))


@pytest.mark.parametrize(("size", "kind"), [(2, "llama"), (3, "qwen2")])
def test_several_ranks_say_what_one_says(size, kind, ranks, one_rank):
    assert_equal(ranks[size], one_rank[kind]["logprobs"], atol=1e-5)


def test_int8_layers_on_two_ranks(ranks, one_rank):
    assert_equal(ranks["w8a8"], one_rank["w8a8"]["logprobs"], atol=ROUNDED)


def test_the_compiled_model_says_what_the_eager_one_says(uniform, one_rank, folder):
    [compiled] = run_jobs([{"model": uniform, "dtype": "bfloat16", "prompts": PROMPTS}], folder / "compiled")
    assert_equal(compiled, one_rank["bfloat16"]["logprobs"], atol=0.03)
