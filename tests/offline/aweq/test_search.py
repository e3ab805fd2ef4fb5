import pytest
import torch
from requant import architectures, models
from requant.aweq.observe import input_ranges
from requant.aweq.rewrite import Rewriter
from requant.aweq.search import Equalizer, roundings
from requant.aweq.settings import Equalization
from requant.aweq.trial import Trial
from requant.families.dense import LLAMA
from requant.walk import block_calls
from requant_kernels.scheme import W8A8_WEIGHTS, ActivationScheme, LayerScheme, WeightScheme

from tests.offline.aweq.tiny import CONFIGS, tiny_model

SAMPLES = [torch.randint(0, 64, (1, 32), generator=torch.Generator().manual_seed(i)) for i in range(4)]
DYNAMIC = LayerScheme(W8A8_WEIGHTS, activations=ActivationScheme(dynamic=True))
STATIC = LayerScheme(W8A8_WEIGHTS, activations=ActivationScheme(dynamic=False))
WEIGHTS = LayerScheme(WeightScheme(3, 32, symmetric=False))


@pytest.fixture(autouse=True)
def few_alphas(monkeypatch):
    monkeypatch.setattr("requant.aweq.search.ALPHAS", (0.5, 0.8))


def outliers(model):
    """The same function with activations that are hard to round, as in large language models."""
    with torch.no_grad():
        for block in model.model.layers:
            block.input_layernorm.weight[:2] *= 64
            for linear in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj):
                linear.weight[:, :2] /= 64
            block.mlp.up_proj.weight[:3] *= 64
            block.mlp.down_proj.weight[:, :3] /= 64
    return model


def equalizer_of(model, schemes, settings):
    architecture = architectures.ARCHITECTURES[model.config.model_type]
    blocks = [block.requires_grad_(False) for _, block in models.blocks(model, architecture)]
    calls = block_calls(model, blocks, SAMPLES)
    rewriter = Rewriter.of(model.config, architecture, torch.float32)
    return blocks[0], calls, Equalizer(rewriter, settings, schemes)


def equalize(model, scheme, settings):
    architecture = architectures.ARCHITECTURES[model.config.model_type]
    linears = architecture.of(next(models.blocks(model, architecture))[1]).linears
    block, calls, equalizer = equalizer_of(model, dict.fromkeys(linears, scheme), settings)
    return equalizer.equalize(block, calls.hidden, calls.keywords[0])[0]


@pytest.mark.parametrize("scheme", [DYNAMIC, STATIC, WEIGHTS], ids=["dynamic", "static", "3 bit"])
def test_the_model_stays_the_same_function_and_keeps_no_hook(scheme):
    model = outliers(tiny_model("llama with grouped queries"))
    with torch.no_grad():
        wanted = model(SAMPLES[0]).logits
        equalize(model, scheme, Equalization("minmax"))
        found = model(SAMPLES[0]).logits
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("scheme", [DYNAMIC, STATIC], ids=["dynamic", "static"])
def test_where_outliers_hurt_the_search_equalizes_and_the_error_falls(scheme):
    model = outliers(tiny_model("llama with grouped queries"))
    schemes = dict.fromkeys(LLAMA.linears, scheme)
    block, calls, equalizer = equalizer_of(model, schemes, Equalization("minmax"))
    weights = {name: one.weights for name, one in schemes.items()}

    def error() -> float:
        """Of the block with all of it rounded."""
        ranges, outputs = input_ranges(block, list(schemes), calls.hidden, calls.keywords[0])
        return Trial.of(block, calls.hidden, outputs, calls.keywords[0]).error(weights, roundings(schemes, ranges))

    before = error()
    chosen, _ = equalizer.equalize(block, calls.hidden, calls.keywords[0])
    assert chosen["input_layernorm"] is not None
    assert chosen["mlp.up_proj"] is not None
    assert error() < before / 4


@pytest.mark.parametrize("kind", ["minmax", "absmax"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_fixed_alpha_is_applied_to_every_pair_of_every_architecture(name, kind):
    model = tiny_model(name)
    pairs = Rewriter.of(model.config, architectures.ARCHITECTURES[model.config.model_type], torch.float32).pairs
    assert equalize(model, DYNAMIC, Equalization(kind, 0.5)) == {pair.producer: 0.5 for pair in pairs}


def test_pairs_with_a_layer_that_stays_as_it_was_are_left_alone():
    model = tiny_model("llama with grouped queries")
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj")
    block, calls, equalizer = equalizer_of(model, dict.fromkeys(names, DYNAMIC), Equalization("minmax", 0.5))
    before = block.mlp.down_proj.weight.clone()
    assert list(equalizer.equalize(block, calls.hidden, calls.keywords[0])[0]) == ["input_layernorm"]
    assert torch.equal(block.mlp.down_proj.weight, before)
