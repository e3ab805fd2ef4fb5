"""Whole models in vLLM: their log-probabilities are those of transformers on the decoded weights."""

import json
import re
from pathlib import Path

import pytest
import torch
from requant import api
from requant.recipe import Override, Recipe
from requant_kernels.dense_sparse import int4_panels
from requant_kernels.scheme import (
    W8A8_WEIGHTS,
    ActivationScheme,
    CheckpointScheme,
    LayerScheme,
    SparseScheme,
    WeightScheme,
)
from requant_kernels.tensor_parallel import cut_groups

from tests.vllm_requant.checkpoints import CONFIGS, HEADS, OTHERS, decoded, edit, quantize, random_model, rounded_blocks
from tests.vllm_requant.engine import run_jobs
from vllm_requant.in_flight import DEFAULT

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


# What rounding alone makes of two models: as --quantization requant chooses it, and as --hf-overrides asks for it.
ROUNDED_ALONE = {
    "in flight": ("opt", Recipe(WeightScheme(4, 64, symmetric=False))),
    "in flight by overrides": (
        "qwen2",
        Recipe(
            WeightScheme(3, 32), overrides={r".*down_proj": Override(WeightScheme(8, -1))}, ignore=(r".*1\..*o_proj",)
        ),
    ),
}


@pytest.fixture(scope="module")
def rounded(folder, mixed) -> dict[str, Path]:
    """The checkpoints that `requant quantize` makes."""
    for name, (kind, recipe) in ROUNDED_ALONE.items():
        api.quantize(folder / kind, folder / name, recipe)
    return {name: folder / name for name in ROUNDED_ALONE}


@pytest.fixture(scope="module")
def heads(folder) -> dict[str, Path]:
    """Models whose output head is quantized as well, of its own or tied to the embeddings."""
    recipe = Recipe(WeightScheme(4, 64, symmetric=False), outliers=0.01, quantize_lm_head=True)
    for kind in HEADS:
        source = edit(random_model(kind, folder / f"{kind} quiet"), folder / kind, louder)
        api.quantize(source, folder / f"{kind}-head", recipe)
    return {kind: folder / f"{kind}-head" for kind in HEADS}


def louder(tensors, config):
    """The logits of a random model are all alike; ten times as large, they are not."""
    head = "model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"
    tensors[head] = 10 * tensors[head]


@pytest.fixture(scope="module")
def stored(mixed, uniform, w8a8, rounded) -> dict[str, Path]:
    """All checkpoints whose output head is as it was."""
    return mixed | rounded | {"uniform": uniform, "w8a8": w8a8}


@pytest.fixture(scope="module")
def expected(folder, stored, heads) -> dict[str, list[torch.Tensor]]:
    """Log-probabilities [tokens-1, vocabulary] of each prompt, by transformers in float32."""
    models = {name: decoded(path, folder / f"{name} decoded") for name, path in stored.items()}
    models |= {name: api.load_quantized(path) for name, path in heads.items()}
    models |= {kind: rounded_blocks(random_model(kind, folder / kind), DEFAULT.scheme) for kind in OTHERS}
    return {name: logprobs(model) for name, model in models.items()}


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
    "output layer": (declare(ignore=[]), "lm_head: an output head can be int8"),
}


@pytest.fixture(scope="module")
def one_rank(folder, mixed, stored, heads, expected) -> dict[str, dict]:
    common, uniform = {"enforce_eager": True, "prompts": PROMPTS}, stored["uniform"]
    jobs = {kind: common | {"model": path, "dtype": "float32"} for kind, path in mixed.items()}
    jobs["bfloat16"] = common | {"model": uniform, "dtype": "bfloat16"}
    jobs["by flag"] = common | {"model": uniform, "dtype": "float32", "quantization": "requant"}
    jobs["w8a8"] = common | {"model": stored["w8a8"], "dtype": "float32"}
    jobs |= {kind: common | {"model": path, "dtype": "float32"} for kind, path in heads.items()}
    jobs["dummy"] = common | {"model": mixed["llama"], "dtype": "bfloat16", "load_format": "dummy"}
    jobs["dummy head"] = jobs["dummy"] | {"model": heads["tied"]}
    jobs["in flight"] = common | {"model": folder / "opt", "dtype": "float32", "quantization": "requant"}
    asked = json.loads((stored["in flight by overrides"] / "config.json").read_text())["quantization_config"]
    asked["ignore"].append("o_proj")  # no whole name
    overrides = {"hf_overrides": {"quantization_config": asked}}
    jobs["in flight by overrides"] = common | {"model": folder / "qwen2", "dtype": "float32"} | overrides
    jobs |= {kind: jobs["in flight"] | {"model": folder / kind} for kind in OTHERS}
    jobs["in flight, dummy"] = jobs["in flight"] | {"load_format": "dummy"}
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
        assert re.search("with torch.bfloat16 on cpu run as cpu_(bf16|int4)", (folder / "one rank" / "log").read_text())


def test_int8_layers_of_every_kind_beside_4_bit_ones(one_rank, expected):
    assert_equal(one_rank["w8a8"], expected["w8a8"], atol=ROUNDED)


@pytest.mark.parametrize("kind", HEADS)
def test_output_heads_and_the_embeddings_tied_to_them(kind, one_rank, expected):
    assert_equal(one_rank[kind], expected[kind], atol=ROUNDED)


@pytest.mark.parametrize("name", ["dummy", "dummy head", "in flight, dummy"])
def test_dummy_weights_are_served(name, one_rank):
    assert all(torch.isfinite(logprobs).all() for logprobs in one_rank[name]["logprobs"])


@pytest.mark.parametrize("name", [*ROUNDED_ALONE, *OTHERS])
def test_an_unquantized_model_is_rounded_to_what_a_checkpoint_would_be(name, one_rank, expected):
    assert_equal(one_rank[name], expected[name], atol=1e-5)


def test_the_log_says_how_layers_are_rounded_once(one_rank, folder):
    log = (folder / "one rank" / "log").read_text()
    for scheme in ("w4 g64 asym", "w3 g32 sym", "w8 row sym"):
        assert log.count(f"rounded to nearest while they are loaded: {scheme}") == 1


def test_the_log_tells_of_a_pattern_that_matches_nothing(one_rank, folder):
    log = (folder / "one rank" / "log").read_text()
    assert re.findall(r"quantization_config: (\S+) matches no layer", log) == ["'o_proj'"]


@pytest.mark.parametrize("name", TAMPERED)
def test_a_tampered_checkpoint_is_refused_by_name(name, one_rank):
    assert re.search(TAMPERED[name][1], one_rank[name].get("error", "it was served"))


# -- several ranks, several stages, and the compiler --


@pytest.fixture(scope="module")
def ranks(folder, mixed, w8a8, heads) -> dict[int | str, dict]:
    common = {"dtype": "float32", "enforce_eager": True, "prompts": PROMPTS}
    jobs = [
        common | {"model": mixed["llama"], "tensor_parallel_size": 2},
        # one key/value head, which all ranks need
        common | {"model": mixed["qwen2"], "tensor_parallel_size": 3},
        common | {"model": mixed["qwen2"], "tensor_parallel_size": 4},
        common | {"model": w8a8, "tensor_parallel_size": 2},
        common | {"model": heads["tied"], "tensor_parallel_size": 2},
        # on a CPU, vLLM makes the buffer of a later stage while it compiles: no eager mode
        common
        | {"model": mixed["llama"], "pipeline_parallel_size": 2}
        | {"enforce_eager": False, "compilation_config": {"mode": 1, "backend": "eager"}},
    ]
    return dict(zip((2, 3, 4, "w8a8", "tied", "stages"), run_jobs(jobs, folder / "ranks"), strict=True))


@pytest.mark.parametrize(("size", "kind"), [(2, "llama"), (3, "qwen2"), (4, "qwen2")])
def test_several_ranks_say_what_one_says(size, kind, ranks, one_rank):
    assert_equal(ranks[size], one_rank[kind]["logprobs"], atol=1e-5)


def test_the_log_says_what_four_ranks_do_to_groups_in_the_words_of_check(ranks, folder):
    log = (folder / "ranks" / "log").read_text()
    for group_size in (64, 128):
        assert log.count(cut_groups(384, group_size, 4)) == 1


@pytest.mark.parametrize("kind", ["w8a8", "tied"])
def test_int8_layers_on_two_ranks(kind, ranks, one_rank):
    assert_equal(ranks[kind], one_rank[kind]["logprobs"], atol=ROUNDED)


def test_two_stages_say_what_one_says(ranks, one_rank):
    assert_equal(ranks["stages"], one_rank["llama"]["logprobs"], atol=1e-5)


def test_the_compiled_model_says_what_the_eager_one_says(uniform, one_rank, folder):
    [compiled] = run_jobs([{"model": uniform, "dtype": "bfloat16", "prompts": PROMPTS}], folder / "compiled")
    assert_equal(compiled, one_rank["bfloat16"]["logprobs"], atol=0.03)
