"""The whole line: `requant quantize`, `vllm serve`, the OpenAI client; and the two perplexities agree."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from openai import BadRequestError, OpenAI
from requant.server import ServerError, serve
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from tests.e2e.conftest import requant

pytestmark = pytest.mark.server

SEQLEN, WINDOWS = 256, 16
SERVE = ("--enforce-eager", "--max-model-len", "512")


@pytest.fixture(scope="module")
def client(checkpoint, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "server.log"
    with serve(checkpoint, "--quantization", "requant", "--served-model-name", "micro", *SERVE, log=log) as server:
        yield OpenAI(base_url=f"{server.url}/v1", api_key="none")


def test_it_completes_text(client):
    answer = client.completions.create(model="micro", prompt="She was", max_tokens=16, temperature=0)
    assert answer.usage.completion_tokens == 16
    again = client.completions.create(model="micro", prompt="She was", max_tokens=16, temperature=0)
    assert again.choices[0].text == answer.choices[0].text


def test_it_streams(client):
    whole = client.completions.create(model="micro", prompt="It was", max_tokens=8, temperature=0).choices[0].text
    stream = client.completions.create(model="micro", prompt="It was", max_tokens=8, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == whole


def test_an_oversized_request_is_the_clients_error(client):
    with pytest.raises(BadRequestError):
        client.completions.create(model="micro", prompt=[5] * 600, max_tokens=1)


def served_perplexity(client: OpenAI, tokens: list[int]) -> float:
    """Over the first windows of ``tokens``, from the log-probabilities of prompts."""
    total = 0.0
    for window in range(WINDOWS):
        ids = tokens[window * SEQLEN : (window + 1) * SEQLEN]
        answer = client.completions.create(
            model="micro", prompt=ids, max_tokens=1, temperature=0, extra_body={"prompt_logprobs": 0}
        )
        scored = answer.choices[0].model_dump()["prompt_logprobs"]
        total += sum(entry[str(token)]["logprob"] for entry, token in zip(scored[1:], ids[1:], strict=True))
    return math.exp(-total / (WINDOWS * (SEQLEN - 1)))


def assert_perplexities_agree(client: OpenAI, checkpoint: Path, text: Path) -> None:
    tokens = AutoTokenizer.from_pretrained(checkpoint)(text.read_text(), add_special_tokens=False).input_ids
    arguments = ("--text", text, "--seqlen", SEQLEN, "--tokens", SEQLEN * WINDOWS, "--json")
    evaluated = json.loads(requant("eval", checkpoint, *arguments))["perplexity"]
    assert served_perplexity(client, tokens) == pytest.approx(evaluated, rel=5e-3)


def test_served_and_evaluated_perplexity_agree(client, checkpoint, persuasion):
    assert_perplexities_agree(client, checkpoint, persuasion)


@pytest.mark.gpu
def test_graphs_of_all_sizes_answer_and_compile_nothing_under_load(checkpoint, persuasion, tmp_path):
    monitored = ("--max-model-len", "512", "--jit-monitor-mode", "error")  # with compilation and CUDA graphs
    with serve(checkpoint, "--served-model-name", "micro", *monitored, log=tmp_path / "server.log") as server:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
        for streams in (1, 3, 20, 100):  # of which each is a token of a step
            prompts = [[5 + stream] * (1 + 3 * stream) for stream in range(streams)]
            answer = client.completions.create(model="micro", prompt=prompts, max_tokens=8, temperature=0)
            assert answer.usage.completion_tokens == 8 * streams
        assert_perplexities_agree(client, checkpoint, persuasion)
        server.check()


def test_the_server_refuses_a_tampered_checkpoint_by_name(checkpoint, tmp_path):
    bad = tmp_path / "bad"
    shutil.copytree(checkpoint, bad)
    [shard] = bad.glob("*.safetensors")
    tensors = load_file(shard)
    name = "model.layers.0.mlp.down_proj.sparse_columns"
    columns = tensors[name].to(torch.int32)
    columns[-1] = 9999
    save_file(tensors | {name: columns.to(torch.uint16)}, shard, metadata={"format": "pt"})
    refused = pytest.raises(ServerError, match=r"layers\.0\.mlp\.down_proj\.sparse_columns: 9999 is outside")
    with refused, serve(bad, *SERVE, log=tmp_path / "server.log"):
        pass
