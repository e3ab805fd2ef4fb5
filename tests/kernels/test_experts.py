"""Routed experts: each token gets the weighted sum over its experts."""

import pytest
import torch
from requant_kernels.experts import Expert, run_experts
from torch.nn.functional import linear, silu

E, K, C, INNER = 5, 2, 16, 24


def layer(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[tuple[torch.Tensor, ...]]]:
    """x, weights, ids and the (gate, up, down) of each expert; the last one gets no token."""
    torch.manual_seed(tokens)
    ids = torch.stack([torch.randperm(E - 1)[:K] for _ in range(tokens)]) if tokens else torch.empty(0, K).int()
    matrices = [tuple(torch.randn(*shape) for shape in ((INNER, C), (INNER, C), (C, INNER))) for _ in range(E)]
    return torch.randn(tokens, C), torch.rand(tokens, K), ids, matrices


def expert(gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> Expert:
    return Expert(lambda x: linear(x, torch.cat([gate, up])), lambda x: linear(x, down))


@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_a_token_gets_the_weighted_sum_of_its_experts(tokens):
    x, weights, ids, matrices = layer(tokens)
    expected = torch.zeros(tokens, C)
    for token in range(tokens):
        for share, index in zip(weights[token], ids[token], strict=True):
            gate, up, down = matrices[index]
            expected[token] += share * (down @ (silu(gate @ x[token]) * (up @ x[token])))
    torch.testing.assert_close(run_experts(x, weights, ids, [expert(*one) for one in matrices]), expected)


def test_what_an_expert_says_of_other_tokens_does_not_matter():
    x, weights, ids, matrices = layer(7)
    experts = [expert(*one) for one in matrices]
    expected = run_experts(x, weights, ids, experts)
    poisoned = Expert(lambda x: x.new_full((len(x), 2 * INNER), float("inf")), lambda x: x[:, :C])
    torch.testing.assert_close(run_experts(x, weights, ids, [*experts[:-1], poisoned]), expected)


def test_the_dtype_is_that_of_the_tokens():
    x, weights, ids, matrices = layer(3)
    experts = [expert(*(one.bfloat16() for one in three)) for three in matrices]
    assert run_experts(x.bfloat16(), weights, ids.int(), experts).dtype == torch.bfloat16
