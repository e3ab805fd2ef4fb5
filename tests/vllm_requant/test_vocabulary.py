"""Real output heads and embeddings of vLLM, alone and tied, on one rank and on a part of the vocabulary."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from requant_kernels.errors import CheckpointError, SchemeError
from requant_kernels.scheme import HEAD_SCHEME, CheckpointScheme, LayerScheme, WeightScheme
from requant_kernels.w8a8 import dispatch
from requant_kernels.w8a8.interface import LayerConfig
from requant_kernels.w8a8.weight import W8A8Weight
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers import vocab_parallel_embedding
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.utils import StageMissingLayer

from tests.kernels.strategies import random_w8a8
from vllm_requant.config import RequantConfig

pytestmark = pytest.mark.usefixtures("vllm_state")

TOKENS, K = 97, 192  # vLLM pads to 128
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def quantization(tied: bool) -> RequantConfig:
    config = RequantConfig(CheckpointScheme(LayerScheme(WeightScheme(4)), overrides={"lm_head": HEAD_SCHEME}))
    text = SimpleNamespace(tie_word_embeddings=tied)
    # a folder, which vLLM does not look for on the hub
    whole = SimpleNamespace(get_text_config=lambda: text, name_or_path="")
    config.maybe_update_config(str(Path(__file__).parent), whole)
    return config


def build(kind: type[VocabParallelEmbedding], *, tied: bool, prefix: str = "", dtype=torch.float32, config=True):
    quant_config = quantization(tied) if config else None
    return kind(TOKENS, K, params_dtype=dtype, quant_config=quant_config, prefix=prefix)


def load(layer: VocabParallelEmbedding, weight: W8A8Weight) -> None:
    for name, tensor in weight.to_tensors().items():
        parameter = getattr(layer, name)
        parameter.weight_loader(parameter, tensor)


def process(*layers: VocabParallelEmbedding) -> None:
    for layer in layers:
        layer.quant_method.process_weights_after_loading(layer)


def stored(rows: int = TOKENS) -> W8A8Weight:
    return random_w8a8(HEAD_SCHEME.activations, (rows, K))


def logits(x: torch.Tensor, weight: W8A8Weight) -> torch.Tensor:
    """float64 [M, N], from nothing but the words of docs/FORMAT.md."""
    x = x.double()
    step = x.abs().amax(-1, keepdim=True) / 127
    return (x / step).round() @ weight.codes.double().T * step * weight.scale.double()


def rows(weight: W8A8Weight) -> torch.Tensor:
    """float64 [N, K]."""
    return weight.codes.double() * weight.scale.double()[:, None]


def assert_logits(layer: ParallelLMHead, weight: W8A8Weight, dtype: torch.dtype) -> None:
    x = torch.randn(5, K, generator=torch.Generator().manual_seed(0))
    x[:, 0] = 127 / 32  # a power of two as the step, so that float64 rounds to the same codes
    x = (x.clamp(-127 / 32, 127 / 32) * 32).round() / 32
    served = layer.quant_method.apply(layer, x.to(dtype))
    expected = logits(x, weight)
    assert served.dtype == dtype
    torch.testing.assert_close(
        served[:, : len(weight.codes)].double(), expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-4
    )
    assert not served[:, len(weight.codes) :].any()


@DTYPES
def test_an_output_head_of_its_own_has_zeros_where_the_vocabulary_is_padded(dtype):
    layer, weight = build(ParallelLMHead, tied=False, prefix="lm_head", dtype=dtype), stored()
    load(layer, weight)
    process(layer)
    assert_logits(layer, weight, dtype)
    x, bias = torch.randn(3, K, dtype=dtype), torch.ones(128, dtype=dtype)
    more = layer.quant_method.apply(layer, x, bias) - layer.quant_method.apply(layer, x)
    torch.testing.assert_close(more[:, TOKENS:], bias[TOKENS:].expand(3, -1))
    assert not hasattr(layer, "codes")  # nothing is looked up


def tied_pair(dtype: torch.dtype = torch.float32) -> tuple[VocabParallelEmbedding, ParallelLMHead]:
    embeddings = build(VocabParallelEmbedding, tied=True, dtype=dtype)
    head = build(ParallelLMHead, tied=True, prefix="lm_head", dtype=dtype)
    return embeddings, head.tie_weights(embeddings)


@DTYPES
def test_tied_embeddings_are_looked_up_and_multiplied(dtype):
    (embeddings, head), weight = tied_pair(dtype), stored()
    load(embeddings, weight)
    process(embeddings, head)
    tokens = torch.tensor([[0, 96, 5], [5, 17, 0]])
    assert torch.equal(embeddings(tokens), rows(weight)[tokens].to(dtype))
    assert_logits(head, weight, dtype)


def test_a_tied_head_holds_nothing_of_its_own():
    embeddings, head = tied_pair()
    assert not list(head.parameters())
    load(embeddings, stored())
    process(embeddings, head)
    assert head.weight is embeddings.weight
    codes = [one for one in embeddings.parameters() if one.dtype == torch.int8]
    assert sum(one.numel() for one in codes) <= 128 * K  # at most one copy beside what a product has packed


@pytest.mark.parametrize("name", ["cpu_int8_avx512", "cpu_int8_avx2", "onednn", "int_mm", "float32"])
def test_codes_are_kept_twice_only_where_a_product_hides_them(name, monkeypatch):
    chosen = dispatch.IMPLEMENTATIONS[name]
    able, reason = chosen.can_implement(LayerConfig.of(stored(), torch.float32, torch.device("cpu")))
    if not able:
        pytest.skip(reason)
    monkeypatch.setattr(dispatch, "first_able", lambda *_: chosen)
    (embeddings, head), weight = tied_pair(), stored()
    load(embeddings, weight)
    process(embeddings, head)
    assert hasattr(embeddings, "codes") == (name == "onednn")
    tokens = torch.tensor([[3, 96], [0, 64]])
    assert torch.equal(embeddings(tokens), rows(weight)[tokens].float())
    assert_logits(head, weight, torch.float32)


@pytest.mark.parametrize(
    ("rank", "ranks"), [(0, 2), (1, 2), (3, 4), (7, 8)], ids=["whole", "padded", "one token", "padding only"]
)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_rank_takes_its_part_of_the_vocabulary(tied, rank, ranks, monkeypatch):
    monkeypatch.setattr(vocab_parallel_embedding, "get_tensor_model_parallel_rank", lambda: rank)
    monkeypatch.setattr(vocab_parallel_embedding, "get_tensor_model_parallel_world_size", lambda: ranks)
    monkeypatch.setattr(vocab_parallel_embedding, "tensor_model_parallel_all_reduce", lambda part: part)
    weight = stored()
    share = 128 // ranks
    part = weight.take_rows(torch.arange(min(rank * share, TOKENS), min((rank + 1) * share, TOKENS)))
    head = build(ParallelLMHead, tied=tied, prefix="lm_head")
    layer = build(VocabParallelEmbedding, tied=tied) if tied else head
    if tied:
        head = head.tie_weights(layer)
    load(layer, weight)
    process(*{id(one): one for one in (layer, head)}.values())
    assert_logits(head, part, torch.float32)
    if tied:
        tokens = torch.tensor([3, 63, 64, 96])
        here = tokens // share == rank
        expected = torch.where(here[:, None], rows(weight)[tokens], 0.0).float()
        assert torch.equal(layer(tokens), expected)


def test_an_embedding_model_needs_no_head():
    """vLLM takes it out (models/adapters.py) and hands another layer to its method, when no tensor has come."""
    head = build(ParallelLMHead, tied=False, prefix="lm_head")
    head.quant_method.process_weights_after_loading(StageMissingLayer("output", head))


def test_embeddings_stay_as_they_are_where_the_head_is_not_tied_to_them():
    assert quantization(tied=False).get_quant_method(build(VocabParallelEmbedding, tied=False), "") is None


def test_embeddings_that_vllm_does_not_offer_are_refused():
    embeddings = build(VocabParallelEmbedding, tied=True, config=False)
    with pytest.raises(SchemeError, match=r"^lm_head: vLLM can not quantize the embeddings of this model"):
        build(ParallelLMHead, tied=True, prefix="lm_head").tie_weights(embeddings)


def test_a_missing_tensor_is_named():
    embeddings, head = tied_pair()
    embeddings.weight.weight_loader(embeddings.weight, stored().codes)
    with pytest.raises(CheckpointError, match=r"^embed_tokens\.weight_scale: missing in the checkpoint$"):
        process(embeddings, head)


@pytest.mark.parametrize("count", [96, 98, 128])
def test_another_vocabulary_is_refused(count):
    embeddings, _ = tied_pair()
    with pytest.raises(CheckpointError, match=rf"^embed_tokens: has {count} rows, which do not fit"):
        load(embeddings, stored(count))


def test_unquantized_embeddings_are_refused_by_name():
    embeddings, _ = tied_pair()
    with pytest.raises(CheckpointError, match=r"^embed_tokens\.weight: torch.bfloat16 \[97, 192\], not int8"):
        load(embeddings, replace(stored(), codes=torch.zeros(TOKENS, K, dtype=torch.bfloat16)))


def test_dummy_weights_need_no_checkpoint(monkeypatch):
    monkeypatch.setattr(get_current_vllm_config().load_config, "load_format", "dummy")
    embeddings, head = tied_pair()
    process(embeddings, head)
    assert embeddings(torch.arange(TOKENS)).isfinite().all()
    assert head.quant_method.apply(head, torch.ones(2, K)).isfinite().all()
