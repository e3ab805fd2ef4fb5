import torch
from requant.aweq.error import token_weights, weighted_error

OUTPUTS = [torch.randn(1, 8, 4, generator=torch.Generator().manual_seed(i)) * 10**i for i in range(3)]


def test_losing_everything_weighs_two():
    lost = [torch.zeros_like(output) for output in OUTPUTS]
    assert abs(weighted_error(lost, OUTPUTS, token_weights(OUTPUTS)) - 2) < 1e-5


def test_neither_large_nor_small_tokens_are_overlooked():
    outputs = [torch.ones(1, 100, 4)]
    outputs[0][0, 0] = 1e4
    for token in (0, slice(1, 100)):
        found = [outputs[0].clone()]
        found[0][0, token] = 0
        assert weighted_error(found, outputs, token_weights(outputs)) > 0.9


def test_a_token_without_a_state_has_no_infinite_weight():
    outputs = [torch.ones(1, 4, 2)]
    outputs[0][0, 1] = 0
    weights = token_weights(outputs)[0]
    assert bool(torch.isfinite(weights).all())
    torch.testing.assert_close(weights[1], torch.tensor(1 / 6))
    assert token_weights([torch.zeros(1, 2, 2)])[0].tolist() == [0, 0]
