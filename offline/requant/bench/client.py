"""vLLM's benchmark client, one repetition: `vllm bench serve` with random tokens, fixed seed and lengths."""

import json
import os
import time
from pathlib import Path

from requant.bench.workloads import Workload
from requant.processes import session
from requant.server import QUIET_ENVIRONMENT, VLLM, Server, ServerError, cause

POLL_SECONDS = 0.2
Figures = dict[str, float]  # the client's: tokens a second, milliseconds


def drive(server: Server, model: Path, work: Workload, seed: int, folder: Path) -> Figures:
    """Raises ServerError where the server dies, the client fails or a request is not answered in full."""
    log, result = folder / "client.log", folder / "result.json"
    result.unlink(missing_ok=True)
    command = [*VLLM, *_arguments(server.url, model, work, seed), "--result-dir", str(folder)]
    with session(command, log=log, environment=QUIET_ENVIRONMENT | dict(os.environ)) as client:
        while client.poll() is None:
            server.check()
            time.sleep(POLL_SECONDS)
    server.check()
    if client.returncode:
        told = cause(log.read_text(errors="replace"))
        raise ServerError(f"vllm bench serve exited with {client.returncode} (logs: {folder})\n{told}")
    return checked(json.loads(result.read_text()), work, server.log)


def _arguments(url: str, model: Path, work: Workload, seed: int) -> list[str]:
    return [
        *("bench", "serve", "--base-url", url, "--model", str(model), "--dataset-name", "random", "--ignore-eos"),
        *("--random-input-len", str(work.shape.input), "--random-output-len", str(work.shape.output)),
        *("--num-prompts", str(work.prompts), "--max-concurrency", str(work.streams)),
        *("--num-warmups", str(work.streams), "--seed", str(seed), "--temperature", "0", "--disable-tqdm"),
        *("--save-result", "--result-filename", "result.json"),
    ]


def checked(result: dict[str, object], work: Workload, log: Path) -> Figures:
    """The client's figures. Raises ServerError unless every request was answered in full."""
    if result["completed"] != work.prompts:
        raise ServerError(f"{work.name}: {result['completed']} of {work.prompts} requests answered (log: {log})")
    expected = work.prompts * work.shape.output
    if result["total_output_tokens"] != expected:
        raise ServerError(f"{work.name}: {result['total_output_tokens']} tokens came, not {expected} (log: {log})")
    return {name: value for name, value in result.items() if isinstance(value, int | float)}
