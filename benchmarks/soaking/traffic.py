"""Streams that join and leave until time is up, while memory is sampled and probes are asked."""

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field
from random import Random

from aiohttp import ClientError, ClientSession
from requant.processes import resident_bytes
from requant.server import Server

from benchmarks.soaking.clients import MIX, Target, Unexpected
from benchmarks.soaking.memory import Sample
from benchmarks.soaking.probes import PROMPTS, Agreement, ask

SAMPLES = 300  # over the whole time
BURST = 4  # requests of a stream, at most, before it leaves
AWAY_SECONDS = 2.0  # at most, before it comes back
PROBE_SECONDS = 3.0


@dataclass
class Traffic:
    """What has happened so far. ``requests``: by kind of client; ``failures``: by message."""

    requests: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    samples: list[Sample] = field(default_factory=list)
    agreement: Agreement = field(default_factory=Agreement)


async def drive(
    http: ClientSession, server: Server, target: Target, *, seconds: float, streams: int, quiet: list[str]
) -> Traffic:
    """``quiet``: answers to the probes of the server without load. Raises ServerError where the server dies."""
    traffic, end = Traffic(), time.monotonic() + seconds
    try:
        async with asyncio.TaskGroup() as tasks:
            for number in range(streams):
                tasks.create_task(_stream(http, target, traffic, Random(number), end))
            tasks.create_task(_probe(http, target, traffic, quiet, end))
            tasks.create_task(_watch(server, traffic, seconds))
    except ExceptionGroup as group:
        raise group.exceptions[0] from None
    return traffic


async def _stream(http: ClientSession, target: Target, traffic: Traffic, rng: Random, end: float) -> None:
    while time.monotonic() < end:
        await asyncio.sleep(rng.uniform(0, AWAY_SECONDS))
        for client in rng.choices(list(MIX), weights=list(MIX.values()), k=rng.randint(1, BURST)):
            if time.monotonic() >= end:
                return
            traffic.requests[client.__name__] += 1
            try:
                await client(http, target, rng)
            except (Unexpected, ClientError, TimeoutError) as error:
                traffic.failures[str(error) or type(error).__name__] += 1


async def _probe(http: ClientSession, target: Target, traffic: Traffic, quiet: list[str], end: float) -> None:
    rng = Random("probes")
    while time.monotonic() < end:
        number = rng.randrange(len(PROMPTS))
        try:
            traffic.agreement.count(await ask(http, target, PROMPTS[number]) == quiet[number])
        except (Unexpected, ClientError, TimeoutError) as error:
            traffic.failures[str(error) or type(error).__name__] += 1
        await asyncio.sleep(PROBE_SECONDS)


async def _watch(server: Server, traffic: Traffic, seconds: float) -> None:
    started = time.monotonic()
    while (elapsed := time.monotonic() - started) < seconds:
        server.check()
        traffic.samples.append(Sample(elapsed, resident_bytes(server.session)))
        await asyncio.sleep(seconds / SAMPLES)
