"""quantization_config -> a method for every layer, or one line that says why not."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
from requant_kernels.errors import SchemeError
from requant_kernels.scheme import HEAD_SCHEME, CheckpointScheme, LayerScheme, SparseScheme, WeightScheme
from requant_kernels.tensor_parallel import Shape, obstacles
from transformers import GraniteMoeHybridConfig, PreTrainedConfig
from vllm.config import CompilationMode, ModelConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    QKVParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.utils import WeightsMapper

from tests.configurations import granite_hybrid
from tests.vllm_requant.checkpoints import CONFIGS
from vllm_requant import names
from vllm_requant.config import RequantConfig
from vllm_requant.linear import DenseSparseLinearMethod
from vllm_requant.tensor_parallel import WIDTHS, refuse_degree
from vllm_requant.vocabulary import EmbeddingMethod, OutputHeadMethod

W4, W3 = LayerScheme(WeightScheme(4, 64)), LayerScheme(WeightScheme(3, 64))
QKV, BLOCK = "model.layers.0.self_attn.qkv_proj", "model.layers.0.self_attn"


def config(**arguments) -> RequantConfig:
    result = RequantConfig.from_config(CheckpointScheme(W4, **arguments).to_dict())
    result.packed_modules_mapping.update(LlamaForCausalLM.packed_modules_mapping)
    return result


def layer(kind: type[torch.nn.Module]) -> torch.nn.Module:
    """An instance that has a type and nothing else: all that a config may look at."""
    return kind.__new__(kind)


def test_the_default_scheme_reaches_a_fused_layer_with_the_names_of_its_parts():
    method = config().get_quant_method(layer(QKVParallelLinear), QKV)
    assert isinstance(method, DenseSparseLinearMethod)
    assert method.scheme == W4
    assert method.names == [f"{BLOCK}.q_proj", f"{BLOCK}.k_proj", f"{BLOCK}.v_proj"]


def test_an_override_reaches_a_plain_layer():
    method = config(overrides={r".*o_proj": W3}).get_quant_method(layer(ColumnParallelLinear), f"{BLOCK}.o_proj")
    assert method.scheme == W3


def test_an_ignored_layer_is_unquantized_and_other_modules_are_none_of_our_business():
    some = config(ignore=(r".*[qkv]_proj", "lm_head"))
    assert isinstance(some.get_quant_method(layer(QKVParallelLinear), QKV), UnquantizedLinearMethod)
    assert some.get_quant_method(layer(ParallelLMHead), "lm_head") is None
    assert some.get_quant_method(layer(VocabParallelEmbedding), "model.embed_tokens") is None
    assert some.get_quant_method(torch.nn.Module(), "model.norm") is None


@pytest.mark.parametrize(
    "arguments",
    [{"ignore": (r".*k_proj",)}, {"overrides": {r".*k_proj": W3}}],
    ids=["partly ignored", "of two schemes"],
)
def test_fused_layers_that_differ_are_refused_by_name(arguments):
    with pytest.raises(SchemeError, match=rf"^{QKV}: vLLM fuses {BLOCK}.q_proj and {BLOCK}.k_proj"):
        config(**arguments).get_quant_method(layer(QKVParallelLinear), QKV)


def test_what_cannot_be_served_is_refused_by_name():
    with pytest.raises(SchemeError, match=r"^lm_head: an output head can be int8"):
        config().get_quant_method(layer(ParallelLMHead), "lm_head")


@pytest.mark.parametrize(
    "prefix",
    [
        "visual.blocks.0.attn.qkv",
        "vision_tower.vision_model.encoder.layers.0.mlp.fc1",
        "multi_modal_projector.linear_1",
        "model.connector.modality_projection.proj",
        "audio_tower.layers.0.fc1",
        "language_model.model.layers.0.mlp.gate",
        "language_model.model.layers.0.linear_attn.in_proj_ba",
        "model.layers.0.self_attn.kv_b_proj",
    ],
)
def test_in_flight_only_a_language_model_is_rounded(prefix):
    linear = layer(ColumnParallelLinear)
    linear.input_size = 64
    assert isinstance(RequantConfig().get_quant_method(linear, prefix), UnquantizedLinearMethod)
    inside = RequantConfig().get_quant_method(linear, "language_model.model.layers.0.mlp.up_proj")
    assert isinstance(inside, DenseSparseLinearMethod)


def test_latent_attention_is_not_compiled_for_a_cpu():
    name, some = f"{BLOCK}.kv_b_proj", config(ignore=(r".*kv_b_proj",))
    with set_current_vllm_config(VllmConfig(compilation_config={"mode": CompilationMode.NONE})):
        assert isinstance(some.get_quant_method(layer(ColumnParallelLinear), name), UnquantizedLinearMethod)
    compiled = VllmConfig(compilation_config={"mode": CompilationMode.DYNAMO_TRACE_ONCE})
    with (
        set_current_vllm_config(compiled),
        pytest.raises(SchemeError, match=rf"^{re.escape(name)}: .* --enforce-eager"),
    ):
        some.get_quant_method(layer(ColumnParallelLinear), name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version: 2 is not 1"),
        ({"shiny": True}, "unknown key 'shiny'"),
        ({"scheme": {"weights": {"bits": 5}}}, "bits: 5"),
    ],
    ids=["version", "key", "bits"],
)
def test_a_configuration_that_is_not_understood_is_refused(change, message):
    with pytest.raises(SchemeError, match=message):
        RequantConfig.from_config(CheckpointScheme(W4).to_dict() | change)


def test_an_untested_vllm_is_refused_when_a_checkpoint_is_opened(monkeypatch):
    monkeypatch.setattr("vllm.__version__", "0.99.0")
    with pytest.raises(RuntimeError, match=r"refuses vLLM 0\.99\.0"):
        RequantConfig.from_config(CheckpointScheme(W4).to_dict())


@pytest.mark.parametrize(
    ("mapper", "served", "stored"),
    [
        (WeightsMapper(), "model.layers.0.fc1", ["model.layers.0.fc1"]),
        (
            WeightsMapper(orig_to_new_prefix={"decoder.": "model.decoder."}),
            "model.decoder.layers.0.fc1",
            ["model.decoder.layers.0.fc1", "decoder.layers.0.fc1"],
        ),
        (
            WeightsMapper(orig_to_new_prefix={"model.language_model.": "language_model.model."}),
            "language_model.model.layers.0.fc1",
            ["language_model.model.layers.0.fc1", "model.language_model.layers.0.fc1"],
        ),
        (
            WeightsMapper(orig_to_new_substr={".attention.": ".self_attn."}),
            "model.layers.0.self_attn.o_proj",
            ["model.layers.0.self_attn.o_proj", "model.layers.0.attention.o_proj"],
        ),
        (
            WeightsMapper(orig_to_new_substr={".fc1.": ".mlp.fc1."}),
            "model.layers.0.mlp.fc1",
            ["model.layers.0.fc1"],
        ),
        (
            WeightsMapper(orig_to_new_suffix={".w1.weight": ".gate_proj.weight"}),
            "model.layers.0.gate_proj",
            ["model.layers.0.gate_proj", "model.layers.0.w1"],
        ),
        (
            # as vLLM writes it for models of transformers (models/transformers/base.py)
            WeightsMapper(orig_to_new_regex={re.compile(r"^gpt_neox\.(.+)"): r"model.\1"}),
            "model.layers.0.dense",
            ["model.layers.0.dense", "gpt_neox.layers.0.dense"],
        ),
    ],
    ids=["same", "prefix", "other prefix", "substring", "substring with its end", "suffix", "all"],
)
def test_renamed_layers_are_traced_to_the_checkpoint(mapper, served, stored):
    assert names.original_names(served, [mapper]) == stored


def test_of_several_possible_names_the_one_that_the_scheme_speaks_of_counts():
    mapper = WeightsMapper(orig_to_new_prefix={"decoder.": "model.decoder."})
    for spoken in ("decoder.layers.0.fc1", "model.decoder.layers.0.fc1"):
        scheme = CheckpointScheme(W4, overrides={spoken: W3})
        assert names.scheme_of("model.decoder.layers.0.fc1", scheme, [mapper]) == W3
        scheme = CheckpointScheme(W4, ignore=(spoken,))
        assert names.scheme_of("model.decoder.layers.0.fc1", scheme, [mapper]) is None


class Renaming:
    """As transformers has it (WeightRenaming): a pattern that is not run backwards."""

    def rename_source_key(self, key: str) -> tuple[str, None]:
        return key.replace("up_proj", "gate"), None


def test_a_name_that_cannot_be_traced_is_refused():
    mapper = WeightsMapper(orig_to_new_renaming=[Renaming()])
    with pytest.raises(SchemeError, match=r"^model\.layers\.0\.up_proj: vLLM renames this layer"):
        names.original_names("model.layers.0.up_proj", [mapper])


# -- models that are rounded in flight --


def linear(columns: int) -> torch.nn.Module:
    one = layer(ColumnParallelLinear)
    one.__dict__["input_size"] = columns
    return one


@pytest.mark.parametrize(("columns", "group_size"), [(4096, 64), (576, 64), (96, 32), (72, -1)])
def test_without_a_scheme_the_largest_group_that_divides_is_taken(columns, group_size):
    method = RequantConfig().get_quant_method(linear(columns), f"{BLOCK}.o_proj")
    assert method.scheme == LayerScheme(WeightScheme(4, group_size, symmetric=False))


def test_the_output_layer_and_embeddings_stay_as_they_are_in_flight(folder):
    asked = config()
    asked.maybe_update_config(str(folder({})))
    for one in (RequantConfig(), asked):
        assert one.get_quant_method(layer(ParallelLMHead), "lm_head") is None
        assert one.get_quant_method(layer(VocabParallelEmbedding), "model.embed_tokens") is None
        for name in ("score", "model.layers.0.mlp.gate"):  # of a reward model; a router
            assert isinstance(one.get_quant_method(linear(128), name), UnquantizedLinearMethod)


@pytest.fixture
def folder(tmp_path):
    """A model's folder with nothing but its config.json."""

    def make(content):
        (tmp_path / "config.json").write_text(json.dumps(content))
        return tmp_path

    return make


def test_a_scheme_that_no_file_declares_is_one_to_round_by(folder):
    asked = config()
    asked.maybe_update_config(str(folder({"model_type": "llama"})))
    assert asked.in_flight
    declared = config()
    declared.maybe_update_config(str(folder({"quantization_config": declared.scheme.to_dict()})))
    assert not declared.in_flight


def test_a_head_that_would_stay_as_it_is_has_no_scheme_in_flight(folder):
    asked = config(overrides={"lm_head": HEAD_SCHEME})
    with pytest.raises(SchemeError, match=r"^lm_head: an output head is not rounded in flight"):
        asked.maybe_update_config(str(folder({})))


def test_a_checkpoint_is_not_what_an_override_says(folder):
    other = RequantConfig(CheckpointScheme(W3))
    with pytest.raises(
        SchemeError, match=r"^quantization_config: this checkpoint is quantized, as its config.json says"
    ):
        other.maybe_update_config(str(folder({"quantization_config": CheckpointScheme(W4).to_dict()})))


def test_a_checkpoint_is_not_what_the_config_of_another_folder_says(folder):
    """--quantization requant, and a file at --hf-config-path that declares nothing."""
    silent = RequantConfig()
    with pytest.raises(SchemeError, match=r"neither --hf-overrides nor --hf-config-path can say otherwise$"):
        silent.maybe_update_config(str(folder({"quantization_config": CheckpointScheme(W4).to_dict()})))


@pytest.mark.parametrize("stored", [None, CheckpointScheme(W4).to_dict()], ids=["ordinary", "quantized"])
def test_what_a_folder_without_config_holds_says_the_file_at_hf_config_path(stored, folder, tmp_path):
    (tmp_path / "weights").mkdir()
    asked, elsewhere = config(), folder({"quantization_config": stored})
    asked.maybe_update_config(str(tmp_path / "weights"), PreTrainedConfig(name_or_path=str(elsewhere)))
    assert asked.in_flight == (stored is None)


@pytest.mark.parametrize(("convert", "tokens"), [("classify", ["no", "yes"]), ("classify", None), ("none", ["no"])])
def test_no_classifier_is_made_of_a_quantized_head(convert, tokens, monkeypatch):
    hf_config = PreTrainedConfig(tie_word_embeddings=True, classifier_from_token=tokens)
    model = SimpleNamespace(convert_type=convert, hf_config=hf_config, hf_text_config=hf_config)
    current = SimpleNamespace(speculative_config=None, model_config=model)
    monkeypatch.setattr("vllm.config.get_current_vllm_config_or_none", lambda: current)
    monkeypatch.setattr("vllm_requant.tensor_parallel.refuse_degree", lambda _: None)
    some = config(overrides={"lm_head": HEAD_SCHEME})
    some.hf_config = hf_config
    for kind, method in ((ParallelLMHead, OutputHeadMethod), (VocabParallelEmbedding, EmbeddingMethod)):
        if convert == "none" or not tokens:
            assert isinstance(some.get_quant_method(layer(kind), "lm_head"), method)
            continue
        with pytest.raises(SchemeError, match=r"^lm_head: a classifier can not be made of a quantized output head"):
            some.get_quant_method(layer(kind), "lm_head")


@pytest.mark.parametrize(("method", "refused"), [("eagle", True), ("eagle3", True), ("mtp", False), ("ngram", False)])
def test_quantized_embeddings_are_not_shared_with_a_draft(method, refused, monkeypatch):
    """vLLM compares the width of its embeddings with that of our layout (v1/spec_decode/llm_base_proposer.py)."""
    speculative = SimpleNamespace(method=method, use_eagle=lambda: method != "ngram")
    current = SimpleNamespace(speculative_config=speculative, model_config=None)
    monkeypatch.setattr("vllm.config.get_current_vllm_config_or_none", lambda: current)
    some = config(overrides={"lm_head": HEAD_SCHEME})
    some.hf_config = PreTrainedConfig(tie_word_embeddings=True)
    if not refused:
        assert isinstance(some.get_quant_method(layer(VocabParallelEmbedding), "embed_tokens"), EmbeddingMethod)
        return
    with pytest.raises(SchemeError, match=f"^embed_tokens: quantized embeddings can not be shared .*'{method}'"):
        some.get_quant_method(layer(VocabParallelEmbedding), "embed_tokens")


@pytest.mark.parametrize(
    ("scheme", "columns", "message"),
    [
        (W4, 96, "group_size 64 does not divide in_features 96"),
        (LayerScheme(WeightScheme(4, 64), SparseScheme()), 128, "a sparse part can not be had by rounding alone"),
    ],
    ids=["group", "sparse"],
)
def test_what_rounding_alone_can_not_make_is_refused_by_name(scheme, columns, message, folder):
    asked = RequantConfig(CheckpointScheme(scheme))
    asked.maybe_update_config(str(folder({})))
    with pytest.raises(SchemeError, match=rf"^{BLOCK}\.o_proj: {message}"):
        asked.get_quant_method(linear(columns), f"{BLOCK}.o_proj")


@pytest.mark.parametrize("stages", [1, 2])
def test_a_pattern_that_matches_nothing_is_told_where_one_process_has_all_layers(stages, folder, monkeypatch):
    current = SimpleNamespace(model_config=None, parallel_config=SimpleNamespace(pipeline_parallel_size=stages))
    monkeypatch.setattr("vllm.config.get_current_vllm_config_or_none", lambda: current)
    told = []
    monkeypatch.setattr("vllm_requant.config._LOG.warning", lambda text, *values: told.append(text % values))
    patterns = {"overrides": {r".*k_proj": W4, r".*down": W4}, "ignore": (r".*\.0\..*o_proj", "lm_head", "o_proj")}
    asked = config(**patterns)
    asked.maybe_update_config(str(folder({})))
    methods = [asked.get_quant_method(linear(128), name) for name in (QKV, f"{BLOCK}.o_proj", "model.layers.0.fc")]
    for method in (methods[0], methods[2]):
        method._when_built()
    wanted = [f"quantization_config: {name!r} matches no layer that could be rounded" for name in (".*down", "o_proj")]
    assert told == (wanted if stages == 1 else [])


# -- tensor parallelism --


@pytest.mark.parametrize(
    ("kind", "degree", "field"),
    [
        ("llama", 3, "key_value_heads"),
        ("llama", 2, None),
        ("qwen2", 4, None),
        ("opt", 5, "width"),
        ("granite 4", 2, None),  # routed experts, which it has none of, would have 97 inner channels
        ("granite 4", 8, "state_heads"),
    ],
)
def test_a_degree_is_refused_in_the_words_of_check(kind, degree, field, tmp_path):
    granite = GraniteMoeHybridConfig(
        hidden_size=192,
        num_hidden_layers=2,
        num_attention_heads=24,
        num_key_value_heads=2,
        intermediate_size=97,
        **granite_hybrid(384, 384),
    )
    model = (CONFIGS | {"granite 4": granite})[kind]
    model.save_pretrained(tmp_path)
    shape = Shape(
        model.num_attention_heads,
        getattr(model, "num_key_value_heads", model.num_attention_heads),
        next(getattr(model, name) for name in WIDTHS if hasattr(model, name)),
        state_heads=getattr(model, "mamba_n_heads", 0),
    )
    current = SimpleNamespace(
        model_config=ModelConfig(str(tmp_path), skip_tokenizer_init=True),
        parallel_config=SimpleNamespace(tensor_parallel_size=degree),
    )
    if field is None:
        refuse_degree(current)
        return
    with pytest.raises(SchemeError, match=r"^tensor parallelism: ") as refusal:
        refuse_degree(current)
    assert obstacles(shape, degree)[field] in str(refusal.value)
