"""Served throughput of a quantized checkpoint against its original: same vLLM, same settings, same client, one run.

    python benchmarks/serve.py [CHECKPOINT --against MODEL] [--streams 1,8] [--repetitions 3] [--json FILE] [-- ARGS]

Both servers stand on free loopback ports while vLLM's own client (`vllm bench serve`, random tokens, fixed seed and
lengths) drives one after the other, in turns, so that whatever else the machine does hits both. ARGS go to both
servers. Without a checkpoint the demo's is taken, which `make demo` leaves in the folder demo.
"""

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from vllm_requant.server import QUIET_ENVIRONMENT, serve

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "demo" / "SmolLM2-135M-Instruct"
# Nothing may be remembered from one repetition to the next.
SETTINGS = ("--dtype", "bfloat16", "--max-model-len", "2048", "--no-enable-prefix-caching", "--seed", "0")
SHOWN = {"median_ttft_ms": "first token", "median_itl_ms": "inter-token", "p99_itl_ms": "p99"}


@dataclass(frozen=True)
class Workload:
    """``prompts`` requests of ``input`` random tokens, each answered by exactly ``output``; ``streams`` at a time."""

    kind: str
    streams: int
    input: int
    output: int
    prompts: int
    throughput: str  # which of the client's figures is meant

    @property
    def name(self) -> str:
        return f"{self.kind}, {self.streams} stream{'s' if self.streams > 1 else ''}"


def workloads(streams: list[int]) -> list[Workload]:
    """Decode-heavy for each number of streams; prefill-heavy, where one prompt at a time fills the machine."""
    decode = [Workload("decode", n, 32, 96, 2 * n, "output_throughput") for n in streams]
    return [*decode, Workload("prefill", 1, 1024, 1, 8, "total_token_throughput")]


def drive(url: str, model: Path, work: Workload, seed: int) -> dict[str, Any]:
    """One repetition by vLLM's client -> its figures. Exits where a request failed."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve", "--base-url", url]
        command += ["--model", str(model), "--dataset-name", "random", "--ignore-eos", "--disable-tqdm"]
        command += ["--random-input-len", str(work.input), "--random-output-len", str(work.output)]
        command += ["--num-prompts", str(work.prompts), "--max-concurrency", str(work.streams)]
        command += ["--num-warmups", str(work.streams), "--seed", str(seed), "--temperature", "0"]
        command += ["--save-result", "--result-dir", folder, "--result-filename", "result.json"]
        done = subprocess.run(
            command, env=QUIET_ENVIRONMENT | dict(os.environ), capture_output=True, text=True, check=False
        )
        if done.returncode:
            sys.exit(f"vllm bench serve failed on {model.name}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        result: dict[str, Any] = json.loads((Path(folder) / "result.json").read_text())
    expected = work.prompts * work.output
    if result["completed"] != work.prompts or result["total_output_tokens"] != expected:
        sys.exit(f"{model.name}, {work.name}: {result['completed']} of {work.prompts} requests completed")
    return result


def measure(servers: dict[str, tuple[str, Path]], work: Workload, repetitions: int) -> dict[str, list[dict[str, Any]]]:
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in servers}
    for seed in range(repetitions):
        # the order changes too, so that neither always runs on the warmer machine
        for name, (url, model) in list(servers.items())[:: 1 if seed % 2 else -1]:
            runs[name].append(drive(url, model, work, seed))
            print(f"  {work.name}, {name}: {runs[name][-1][work.throughput]:.1f} tokens/s", flush=True)
    return runs


def ratio(runs: dict[str, list[dict[str, Any]]], work: Workload) -> dict[str, float]:
    """Quantized over original, by repetition: median and extremes."""
    pairs = zip(runs["quantized"], runs["original"], strict=True)
    ratios = sorted(ours[work.throughput] / theirs[work.throughput] for ours, theirs in pairs)
    return {"median": statistics.median(ratios), "low": ratios[0], "high": ratios[-1]}


def print_table(results: list[tuple[Workload, dict[str, list[dict[str, Any]]]]]) -> None:
    print(
        f"\n| {'workload':18} | {'':9} | tokens/s | {' | '.join(f'{t} ms' for t in SHOWN.values())} | ratio (spread) |"
    )
    print("|" + "---|" * (4 + len(SHOWN)))
    for work, runs in results:
        for name, repetitions in runs.items():
            middle = {key: statistics.median(run[key] for run in repetitions) for key in (work.throughput, *SHOWN)}
            figures = " | ".join(f"{middle[key]:.1f}" for key in (work.throughput, *SHOWN))
            found = ratio(runs, work)
            spread = f"**{found['median']:.2f}** ({found['low']:.2f}-{found['high']:.2f})"
            print(f"| {work.name:18} | {name:9} | {figures} | {spread if name == 'quantized' else ''} |")


def environment(arguments: list[str]) -> dict[str, Any]:
    names = ("torch", "vllm-requant")
    cpu = next((line.split(":")[1].strip() for line in _cpu_lines() if line.startswith("model name")), "")
    return {
        "cpu": cpu or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "settings": arguments,
        "versions": {name: version(name) for name in names},
    }


def _cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def stop(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", type=Path, default=DEMO.with_name(f"{DEMO.name}-requant-w4"))
    parser.add_argument("--against", type=Path, default=DEMO, help="the original")
    parser.add_argument("--streams", type=lambda text: [int(n) for n in text.split(",")], default=[1, 8])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--json", type=Path, help="where to write everything that was measured")
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    options, server_arguments = parser.parse_args(sys.argv[1:split]), sys.argv[split + 1 :]
    signal.signal(signal.SIGTERM, stop)  # so that no server is left behind
    models = {"original": options.against, "quantized": options.checkpoint}
    if missing := [path for path in models.values() if not (path / "config.json").exists()]:
        sys.exit(f"{missing[0]} holds no model: name two folders, or run `make demo` first")
    arguments = [*SETTINGS, *server_arguments]
    results = []
    with ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers = {}
        for name, path in models.items():
            print(f"starting vllm serve {path.name} {' '.join(arguments)}", flush=True)
            servers[name] = (stack.enter_context(serve(path, *arguments, log=logs / f"{name}.log")), path)
        for work in workloads(options.streams):
            results.append((work, measure(servers, work, options.repetitions)))
    print_table(results)
    ratios: dict[str, dict[str, Any]] = {}
    for work, runs in results:
        ratios.setdefault(work.kind, {})[str(work.streams)] = ratio(runs, work)
    if options.json:
        everything = [{"workload": vars(work), "runs": runs} for work, runs in results]
        options.json.write_text(json.dumps({"ratios": ratios, **environment(arguments), "results": everything}))


if __name__ == "__main__":
    main()
