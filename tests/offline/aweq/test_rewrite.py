from copy import deepcopy

import pytest
import torch
from requant import architectures, models
from requant.architecture import Architecture
from requant.aweq.equalization import FLOOR, ChannelRange, scales
from requant.aweq.rewrite import Rewriter
from requant.errors import InputError
from requant.walk import block_calls, run_block
from requant_kernels.reference import quantize_input
from requant_kernels.scheme import ActivationScheme

from tests.offline.aweq.tiny import CONFIGS, tiny_model

IDS = torch.randint(0, 64, (4, 24), generator=torch.Generator().manual_seed(1))


def rewriter_of(config, dtype=torch.float32):
    return Rewriter.of(config, architectures.ARCHITECTURES[config.model_type], dtype)


def relative_error(found, expected):
    return float((found - expected).norm() / expected.norm())


PAIRS = [(name, index) for name in CONFIGS for index in range(len(rewriter_of(CONFIGS[name]).pairs))]


@pytest.mark.parametrize(("name", "index"), PAIRS, ids=[f"{name}, pair {index}" for name, index in PAIRS])
def test_the_rewritten_model_is_the_same_function(name, index):
    model = tiny_model(name)
    with torch.no_grad():
        expected = model(IDS).logits
    rewriter = rewriter_of(model.config)
    pair = rewriter.pairs[index]
    generator = torch.Generator().manual_seed(index)
    changed = False
    for _, block in models.blocks(model, architectures.ARCHITECTURES[model.config.model_type]):
        before = [block.get_submodule(consumer).weight.clone() for consumer in pair.consumers]
        channels = len(rewriter.weight_range(block, pair, "minmax"))
        rewriter.apply(block, pair, torch.exp(torch.randn(channels, generator=generator) * 2))
        for consumer, weight in zip(pair.consumers, before, strict=True):
            changed |= not torch.allclose(block.get_submodule(consumer).weight, weight)
    with torch.no_grad():
        assert relative_error(model(IDS).logits, expected) < 1e-5
    assert changed


def test_pairs_that_are_not_exact_are_left_out():
    assert [pair.producer for pair in rewriter_of(CONFIGS["opt with gelu"]).pairs][-1] == "final_layer_norm"
    after = rewriter_of(CONFIGS["opt with norms after"]).pairs
    assert [pair.through for pair in after] == ["heads", "rows"]


@pytest.mark.parametrize("kind", ["minmax", "absmax"])
@pytest.mark.parametrize("name", ["llama with grouped queries", "opt"])
def test_at_one_half_both_ranges_of_every_channel_become_equal(name, kind):
    model = tiny_model(name)
    rewriter = rewriter_of(model.config)
    blocks = [block for _, block in models.blocks(model, architectures.ARCHITECTURES[model.config.model_type])]
    calls = block_calls(model, blocks, [IDS])
    for pair in rewriter.pairs:
        seen = observe(blocks[0], pair.consumers[0], calls)
        x = rewriter.input_range(blocks[0], pair, seen, kind)
        narrow = x < FLOOR * x[x > 0].median()
        scale = scales(x, rewriter.weight_range(blocks[0], pair, kind))
        rewriter.apply(blocks[0], pair, scale)
        x = rewriter.input_range(blocks[0], pair, observe(blocks[0], pair.consumers[0], calls), kind)
        w = rewriter.weight_range(blocks[0], pair, kind)
        torch.testing.assert_close(x[~narrow], w[~narrow], rtol=1e-4, atol=0)
        assert bool((x < w)[narrow].all())  # what counts as wider than it is stays the narrower of the two


def observe(block, name, calls):
    seen = []
    handle = block.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        run_block(block, calls.hidden[0], calls.keywords[0])
    handle.remove()
    return ChannelRange.of(seen[0])


@pytest.mark.parametrize("name", ["llama with grouped queries", "gemma", "opt"])
def test_a_norm_that_is_stored_in_bfloat16_loses_nothing_but_of_its_bias(name):
    model = tiny_model(name)
    rewriter = rewriter_of(model.config, torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
        original = deepcopy(model)
        for prefix, block in models.blocks(model, architectures.ARCHITECTURES[model.config.model_type]):
            pair = rewriter.pairs[0]
            rewriter.apply(block, pair, torch.rand(64) * 3 + 0.1)
            norm = block.get_submodule(pair.producer)
            assert all(torch.equal(one, one.bfloat16().float()) for one in norm.parameters())
            if getattr(norm, "bias", None) is not None:  # what rounding takes from it has nowhere to go
                before = original.get_submodule(f"{prefix}.{pair.producer}")
                before.bias.copy_(norm.bias * before.weight / norm.weight)
        assert relative_error(model(IDS).logits, original(IDS).logits) < 1e-5


@pytest.mark.parametrize("bad", [0.0, -1.0, float("inf"), float("nan")])
def test_a_scale_that_is_not_positive_and_finite_is_refused(bad):
    model = tiny_model("qwen2")
    rewriter = rewriter_of(model.config)
    scale = torch.ones(64)
    scale[3] = bad
    with pytest.raises(ValueError, match="input_layernorm: an equalization scale is zero or not finite"):
        rewriter.apply(model.model.layers[0], rewriter.pairs[0], scale)


def test_a_channel_that_nothing_activates_or_reads_keeps_its_scale():
    x, w = torch.tensor([4.0, 0.0, 9.0, 0.0]), torch.tensor([1.0, 1.0, 0.0, 0.0])
    assert scales(x, w).tolist() == [2, 1, 1, 1]


@pytest.mark.parametrize("alpha", [0.2, 0.5, 1.0])
def test_a_token_at_home_in_a_channel_that_calibration_hardly_activates_is_not_lost(alpha):
    generator = torch.Generator().manual_seed(0)
    weight, calibration, x = (torch.randn(rows, 64, generator=generator) for rows in (32, 2000, 100))
    calibration[:, 7] *= 1e-8
    scale = scales(*(ChannelRange.of(one).width("minmax") for one in (calibration, weight)), alpha)

    def error(scale):
        rounded = quantize_input(x / scale, ActivationScheme(dynamic=True)).dequantize()
        return relative_error(rounded @ (weight * scale).T, x @ weight.T)

    assert error(scale) < 16**alpha * error(torch.ones(64))


def test_a_parameter_that_leaves_the_dtype_is_equalizations_fault():
    model = tiny_model("opt")
    rewriter = rewriter_of(model.config, torch.float16)
    scale = torch.ones(64)
    scale[3] = 1e-7
    with pytest.raises(ValueError, match="norm: equalization takes it beyond what float16 can hold; use --equalize"):
        rewriter.apply(model.model.decoder.layers[0], rewriter.pairs[0], scale)


def test_unknown_pairs_are_named_with_the_way_out():
    model = tiny_model("mistral")
    bare = Architecture(blocks="model.layers", linears=(), others=(), fused=())
    with pytest.raises(InputError, match=r"architecture 'mistral': no equalization pairs are known .*--equalize none"):
        Rewriter.of(model.config, bare, torch.float32)
