import pytest
import torch
from requant.errors import InputError
from requant.statistics import collect, reached, refuse_unreached
from requant.walk import block_calls, run_block
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


SAMPLES = [torch.randint(64, (1, 12), generator=torch.Generator().manual_seed(i)) for i in range(3)]


def test_blocks_run_one_by_one_give_the_models_output() -> None:
    model = tiny()
    calls = block_calls(model, model.model.layers, SAMPLES)
    for sample, hidden in zip(SAMPLES, calls.hidden, strict=True):
        for block, keywords in zip(model.model.layers, calls.keywords, strict=True):
            hidden = run_block(block, hidden, keywords)  # noqa: PLW2901
        torch.testing.assert_close(model.lm_head(model.model.norm(hidden)), model(sample).logits)


def test_statistics_are_those_of_the_layers_own_inputs() -> None:
    model = tiny()
    block = model.model.layers[0]
    linears = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    calls = block_calls(model, model.model.layers, SAMPLES)
    found = collect(block, linears, calls.hidden, calls.keywords[0])

    seen: dict[str, list[torch.Tensor]] = {name: [] for name in linears}
    for name, linear in linears.items():
        linear.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0].flatten(0, 1)))
    for hidden in calls.hidden:
        run_block(block, hidden, calls.keywords[0])
    for name, statistics in found.items():
        x = torch.cat(seen[name])
        assert statistics.count == len(x) == 36
        torch.testing.assert_close(statistics.second_moment, x.T @ x / len(x))
        torch.testing.assert_close(statistics.mean_absolute, x.abs().mean(0))


def test_layers_with_one_input_share_one_statistic() -> None:
    model = tiny()
    block = model.model.layers[0]
    linears = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    calls = block_calls(model, model.model.layers, SAMPLES)
    found = collect(block, linears, calls.hidden, calls.keywords[0])
    assert found["self_attn.q_proj"] is found["self_attn.k_proj"] is found["self_attn.v_proj"]
    assert found["mlp.gate_proj"] is found["mlp.up_proj"]
    assert len({id(statistics) for statistics in found.values()}) == 4


def test_rescaled_statistics_are_those_of_scaled_inputs() -> None:
    model = tiny()
    block, scale = model.model.layers[0], torch.rand(32) + 0.5
    calls = block_calls(model, model.model.layers, SAMPLES)
    linears = {"self_attn.q_proj": block.self_attn.q_proj}
    plain = collect(block, linears, calls.hidden, calls.keywords[0])["self_attn.q_proj"].rescaled(scale)
    block.input_layernorm.weight.data /= scale
    scaled = collect(block, linears, calls.hidden, calls.keywords[0])["self_attn.q_proj"]
    torch.testing.assert_close(plain.second_moment, scaled.second_moment)
    torch.testing.assert_close(plain.mean_absolute, scaled.mean_absolute)


def test_a_layer_that_no_token_reaches_is_named() -> None:
    model = tiny()
    block, calls = model.model.layers[0], block_calls(model, model.model.layers, SAMPLES)
    linears = {"expert": nn.Linear(4, 4), "query": block.self_attn.q_proj}
    assert collect(block, linears, calls.hidden, calls.keywords[0]).keys() == {"query"}
    assert reached(block, linears, calls.hidden, calls.keywords[0]) == {"query"}
    with pytest.raises(InputError, match=r"^expert: no calibration token reaches this layer \(1 in its block\)"):
        refuse_unreached(["expert"])
