"""What clients do, one request each: complete, stream, leave mid-stream, ask too much, talk nonsense.

Prompts are random tokens, so that any model can be asked. Each raises Unexpected where the server answers otherwise
than it must.
"""

import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from aiohttp import ClientSession

LONGEST_ANSWER = 48  # tokens; many short requests join and leave more often than few long ones


class Unexpected(Exception):
    """An answer that is neither right nor the client's own fault."""


@dataclass(frozen=True)
class Target:
    """A server, its one model, and what it allows."""

    url: str
    model: str
    vocabulary: int
    max_model_len: int

    @property
    def completions(self) -> str:
        return f"{self.url}/v1/completions"

    def request(self, rng: Random) -> dict[str, Any]:
        """One that fits."""
        output = rng.randint(1, min(LONGEST_ANSWER, self.max_model_len // 4))
        return {
            "model": self.model,
            "prompt": self.tokens(rng, rng.randint(1, self.max_model_len - output)),
            "max_tokens": output,
            "temperature": rng.choice((0, 0.8)),
            "logprobs": rng.choice((None, None, 2)),
            "ignore_eos": True,
        }

    def tokens(self, rng: Random, count: int) -> list[int]:
        return [rng.randrange(self.vocabulary) for _ in range(count)]


Client = Callable[[ClientSession, Target, Random], Awaitable[None]]


async def complete(http: ClientSession, target: Target, rng: Random) -> None:
    body = target.request(rng)
    async with http.post(target.completions, json=body) as reply:
        if reply.status != 200:
            raise Unexpected(f"complete: {reply.status} {(await reply.text())[:200]}")
        _check_length("complete", (await reply.json())["usage"], body)


async def stream(http: ClientSession, target: Target, rng: Random) -> None:
    body = target.request(rng) | {"stream": True, "stream_options": {"include_usage": True}}
    last = done = b""
    async with http.post(target.completions, json=body) as reply:
        if reply.status != 200:
            raise Unexpected(f"stream: {reply.status} {(await reply.text())[:200]}")
        async for line in reply.content:
            if line.strip():
                last, done = done, line.removeprefix(b"data: ").strip()
    if done != b"[DONE]":
        raise Unexpected(f"stream: it ended with {done[:200]!r}")
    _check_length("stream", json.loads(last)["usage"], body)


async def cancel(http: ClientSession, target: Target, rng: Random) -> None:
    """Leaves after some lines, at once among them: leaving the block closes the connection."""
    body = target.request(rng) | {"stream": True}
    leave_after = rng.randint(0, body["max_tokens"])
    async with http.post(target.completions, json=body) as reply:
        if reply.status != 200:
            raise Unexpected(f"cancel: {reply.status} {(await reply.text())[:200]}")
        for _ in range(leave_after):
            await reply.content.readline()
        reply.close()


async def oversized(http: ClientSession, target: Target, rng: Random) -> None:
    """A prompt that leaves no room for an answer. One that leaves some is answered in part, and is no error."""
    prompt = target.tokens(rng, target.max_model_len + rng.choice((0, 1, 500)))
    body = {"model": target.model, "prompt": prompt, "max_tokens": 16}
    async with http.post(target.completions, json=body) as reply:
        _expect_refusal("oversized", reply.status)


async def malformed(http: ClientSession, target: Target, rng: Random) -> None:
    good = {"model": target.model, "prompt": "Once", "max_tokens": 4}
    body = rng.choice(
        [
            b"{not json",
            b"",
            b"[]",
            {"model": target.model},
            good | {"model": "nobody"},
            good | {"prompt": []},
            good | {"prompt": [target.vocabulary + 1]},
            good | {"prompt": {"text": "Once"}},
            good | {"max_tokens": -1},
            good | {"max_tokens": "many"},
            good | {"temperature": -1},
            good | {"top_p": 7},
            good | {"n": 0},
            good | {"logprobs": 10_000},
        ]
    )
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with http.post(target.completions, data=data, headers={"Content-Type": "application/json"}) as reply:
        _expect_refusal(f"malformed {data[:120]!r}", reply.status)


# How often each comes, relative to the others.
MIX: dict[Client, int] = {complete: 3, stream: 5, cancel: 4, oversized: 1, malformed: 2}


def _check_length(what: str, usage: dict[str, int], body: dict[str, Any]) -> None:
    if usage["completion_tokens"] != body["max_tokens"]:
        raise Unexpected(f"{what}: {usage['completion_tokens']} tokens, not {body['max_tokens']}")


def _expect_refusal(what: str, status: int) -> None:
    if not 400 <= status < 500:
        raise Unexpected(f"{what}: answered with {status}, not refused")
