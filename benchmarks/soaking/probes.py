"""Fixed prompts at temperature 0, whose answers tell whether the server still computes what it did.

Alone on a quiet server an answer repeats exactly. Beside other requests vLLM's products have other shapes and sum in
another order (its batches are not invariant), so that a near-tie may fall otherwise: under load agreement is counted,
not demanded.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import uuid4

from aiohttp import ClientSession

from benchmarks.soaking.clients import Target, Unexpected

PROMPTS = (
    "She was",
    "It is a truth universally acknowledged, that",
    "The captain looked at the sea and",
    "In the morning they",
    "There was nothing in the letter that",
    "1, 2, 3, 4,",
)
TOKENS = 24


async def ask(http: ClientSession, target: Target, prompt: str) -> str:
    body = {"model": target.model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    # cached prefixes are computed in another order too: a salt of its own keeps each question from finding any
    async with http.post(target.completions, json=body | {"cache_salt": uuid4().hex}) as reply:
        if reply.status != 200:
            raise Unexpected(f"probe: {reply.status} {(await reply.text())[:200]}")
        text: str = (await reply.json())["choices"][0]["text"]
        return text


async def ask_all(http: ClientSession, target: Target) -> list[str]:
    """One after the other, each alone."""
    return [await ask(http, target, prompt) for prompt in PROMPTS]


@dataclass
class Agreement:
    """Of answers under load with those of the quiet server."""

    asked: int = 0
    agreed: int = 0

    def count(self, same: bool) -> None:
        self.asked += 1
        self.agreed += same


def changed(before: Sequence[str], after: Sequence[str]) -> list[str]:
    """A line for each prompt whose answer is not what it was."""
    return [
        f"probe {prompt!r}: {old!r} before, {new!r} after"
        for prompt, old, new in zip(PROMPTS, before, after, strict=True)
        if old != new
    ]
