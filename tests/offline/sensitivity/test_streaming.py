import pytest
import torch
from requant.sensitivity.streaming import streamed_gradients
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from tests.offline.sensitivity.conftest import linear_weights


def small_llama(layers: int) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def test_equals_an_ordinary_backward_pass(model: nn.Module, samples: list[torch.Tensor]) -> None:
    parameters, ids = linear_weights(model), samples[0]
    streamed = {}
    with streamed_gradients(model.model.layers, parameters, lambda name, g: streamed.update({name: g.clone()})):
        model(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in parameters.values())

    for parameter in parameters.values():
        parameter.requires_grad_(True)
    model(input_ids=ids, labels=ids).loss.backward()
    assert streamed.keys() == parameters.keys()
    for name, parameter in parameters.items():
        torch.testing.assert_close(streamed[name], parameter.grad)


@pytest.mark.parametrize("layers", [2, 8])
def test_never_holds_more_gradients_than_one_block(layers: int) -> None:
    model = small_llama(layers)
    parameters, ids, peak = linear_weights(model), torch.randint(64, (1, 16)), 0

    def held(name: str, gradient: torch.Tensor) -> None:
        nonlocal peak
        peak = max(peak, sum(p.grad.numel() for p in parameters.values() if p.grad is not None))

    with streamed_gradients(model.model.layers, parameters, held):
        model(input_ids=ids, labels=ids).loss.backward()
    block = sum(p.numel() for p in parameters.values()) // layers
    assert 0 < peak <= block


def test_restores_the_model_after_a_failure(model: nn.Module) -> None:
    forwards = [block.forward for block in model.model.layers]
    with (
        pytest.raises(RuntimeError, match="stop"),
        streamed_gradients(model.model.layers, linear_weights(model), lambda name, g: None),
    ):
        raise RuntimeError("stop")
    assert [block.forward for block in model.model.layers] == forwards
    assert not any(parameter.requires_grad for parameter in model.parameters())
