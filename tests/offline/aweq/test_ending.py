"""The end of the model, as it looks from the middle of it."""

import pytest
import torch
from requant import architectures, models
from requant.aweq.ending import Ending
from requant.walk import block_calls, run_block

from tests.offline.aweq.tiny import tiny_model

SAMPLES = [torch.randint(0, 64, (1, 16), generator=torch.Generator().manual_seed(i)) for i in range(3)]


@pytest.fixture
def case():
    model = tiny_model("llama with grouped queries")
    blocks = [block for _, block in models.blocks(model, architectures.ARCHITECTURES[model.config.model_type])]
    return blocks, block_calls(model, blocks, SAMPLES)


def test_the_original_arrives_where_it_should(case):
    blocks, calls = case
    ending, hidden = Ending.of(blocks, calls.keywords, calls.hidden), calls.hidden
    for count, (block, keywords) in enumerate(zip(blocks, calls.keywords, strict=True), 1):
        hidden = [run_block(block, sample, keywords) for sample in hidden]
        assert ending.after(count).error(hidden) == 0


def test_each_tokens_error_is_relative_to_its_own_state(case):
    blocks, calls = case
    ending = Ending.of(blocks, calls.keywords, calls.hidden).after(len(blocks))
    changed = [wanted * 1.5 for wanted in ending.wanted]
    assert ending.error(changed) == pytest.approx(0.25)
    changed = [wanted.clone() for wanted in ending.wanted]
    changed[1][0, 5] = 0
    assert ending.error(changed) == pytest.approx(1 / (3 * 16))


def test_what_a_block_gets_wrong_is_run_through_the_others(case):
    blocks, calls = case
    after = Ending.of(blocks, calls.keywords, calls.hidden).after(1)
    hidden = [1.1 * run_block(blocks[0], sample, calls.keywords[0]) for sample in calls.hidden]
    last = [sample.clone() for sample in hidden]
    for block, keywords in zip(blocks[1:], calls.keywords[1:], strict=True):
        last = [run_block(block, sample, keywords) for sample in last]
    wanted = torch.cat(list(after.wanted))
    relative = (torch.cat(last) - wanted).square().sum(-1) / wanted.square().sum(-1)
    assert after.error(hidden) == pytest.approx(float(relative.detach().mean()), rel=1e-5)
    assert after.error(hidden) > 0


def test_few_tokens_decide(case):
    blocks, calls = case
    many = calls.hidden * 100  # 4800 tokens
    assert len(Ending.of(blocks, calls.keywords, many).wanted) == 64
    long = [torch.cat([sample] * 100, 1) for sample in calls.hidden]  # more than enough each; positions do not matter
    assert len(Ending.of([], [], long).wanted) == 1
