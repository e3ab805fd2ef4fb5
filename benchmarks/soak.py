"""Minutes of mixed traffic against one server: nothing may grow, nothing may fail but the clients' own mistakes.

    python benchmarks/soak.py CHECKPOINT [--minutes 30] [--streams 8] [--growth-mb 64] [--json FILE] [--vllm ARG ...]

Streams join, leave, are cancelled midway, ask for more than the model's length, send nonsense. At the end the memory
of all processes of the server must be what it was after warm-up (within --growth-mb), no request may be left over, the
server's log may hold no error, and probes at temperature 0 must be answered as before, each asked alone. Exit code 1
and a line for whatever does not hold. All that follows --vllm goes to `vllm serve`.
"""

import argparse
import asyncio
import json
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

from aiohttp import ClientSession, ClientTimeout
from requant.bench.environment import environment
from requant.processes import leave
from requant.server import Server, ServerError, serve

from benchmarks.soaking.clients import Target
from benchmarks.soaking.memory import growth_bytes
from benchmarks.soaking.probes import ask_all, changed
from benchmarks.soaking.traffic import Traffic, drive
from benchmarks.soaking.verdict import busy, failures

MAX_MODEL_LEN = 512
REQUEST_SECONDS = 600
DRAIN_SECONDS = 60  # for requests that were cancelled last to be gone


async def soak(server: Server, target: Target, options: argparse.Namespace) -> dict[str, Any]:
    """What happened, with ``failures`` at its head. Raises ServerError."""
    async with ClientSession(timeout=ClientTimeout(REQUEST_SECONDS)) as http:
        before = await ask_all(http, target)
        seconds = 60 * options.minutes
        print(f"traffic for {seconds:.0f} s", flush=True)
        traffic = await drive(http, server, target, seconds=seconds, streams=options.streams, quiet=before)
        left_busy = await _drained(http, target)
        after = await ask_all(http, target)
    growth_mb = growth_bytes(traffic.samples) / 1e6
    found = failures(
        unexpected=traffic.failures,
        growth_mb=growth_mb,
        bound_mb=options.growth_mb,
        left_busy=left_busy,
        changed=changed(before, after),
        log=server.log.read_text(errors="replace"),
    )
    return {"failures": found, "growth_mb": growth_mb, "growth_bound_mb": options.growth_mb, **_told(traffic)}


def _told(traffic: Traffic) -> dict[str, Any]:
    return {
        "requests": dict(traffic.requests),
        "agreement_under_load": vars(traffic.agreement),
        "resident_mb": [(round(one.seconds, 1), one.resident_bytes / 1e6) for one in traffic.samples],
    }


async def _drained(http: ClientSession, target: Target) -> dict[str, float]:
    end = time.monotonic() + DRAIN_SECONDS
    while True:
        async with http.get(f"{target.url}/metrics") as reply:
            left = busy(await reply.text())
        if not left or time.monotonic() > end:
            return left
        await asyncio.sleep(0.5)


def summary(report: dict[str, Any]) -> str:
    memory = [value for _, value in report["resident_mb"]]
    agreement = report["agreement_under_load"]
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(report["requests"].items()))
    return "\n".join(
        [
            f"requests: {kinds}",
            f"memory, MB: {memory[0]:.0f} at first, {max(memory):.0f} at most, {memory[-1]:.0f} at last; "
            f"{report['growth_mb']:+.1f} after warm-up (bound {report['growth_bound_mb']:.0f})",
            f"probes under load: {agreement['agreed']} of {agreement['asked']} as on the quiet server",
            *(f"FAILED: {failure}" for failure in report["failures"]),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--streams", type=int, default=8, help="at most at a time")
    parser.add_argument("--growth-mb", type=float, default=64, help="of all processes together, after warm-up")
    parser.add_argument("--json", type=Path, help="where to write memory over time and all counts")
    parser.add_argument("--vllm", nargs=argparse.REMAINDER, default=[])
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, leave)  # so that no server is left behind
    vocabulary = json.loads((options.checkpoint / "config.json").read_text())["vocab_size"]
    arguments = ["--max-model-len", str(MAX_MODEL_LEN), "--seed", "0", *options.vllm]
    where = environment() | {"settings": arguments}
    with tempfile.TemporaryDirectory() as folder:
        print(f"starting vllm serve {options.checkpoint} {' '.join(arguments)}", flush=True)
        try:
            with serve(options.checkpoint, *arguments, log=Path(folder) / "server.log") as server:
                target = Target(server.url, str(options.checkpoint), vocabulary, MAX_MODEL_LEN)
                report = asyncio.run(soak(server, target, options))
        except ServerError as error:
            sys.exit(f"error: {error}")
    print(summary(report))
    if options.json:
        options.json.write_text(json.dumps({**report, **where}))
    if report["failures"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
