"""Served throughput of models against the first of them: same vLLM, same settings, same client, one run.

    python benchmarks/serve.py [MODEL[@DTYPE] ...] [--streams 1,8] [--repetitions 3] [--json FILE] [-- ARGS]

All servers stand on free loopback ports while vLLM's own client (`vllm bench serve`, random tokens, fixed seed and
lengths) drives one after the other, in turns, so that whatever else the machine does hits all. ARGS go to every server.
Activations are bfloat16 where no DTYPE is named. Without models the demo's two are taken, which `make demo` leaves in
the folder demo.
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
DEMO_MODELS = (str(DEMO), f"{DEMO}-requant-w4")
# Nothing may be remembered from one repetition to the next.
SETTINGS = ("--max-model-len", "2048", "--no-enable-prefix-caching", "--seed", "0")
SHOWN = {"median_ttft_ms": "first token", "median_itl_ms": "inter-token", "p99_itl_ms": "p99"}


@dataclass(frozen=True)
class Served:
    """A folder and the dtype of activations."""

    path: Path
    dtype: str

    @classmethod
    def parse(cls, text: str) -> "Served":
        path, _, dtype = text.partition("@")
        return cls(Path(path), dtype or "bfloat16")

    @property
    def name(self) -> str:
        return f"{self.path.name}, {self.dtype}"


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
    """Decode-heavy and prefill-heavy, each for each number of streams."""
    decode = [Workload("decode", n, 32, 96, 2 * n, "output_throughput") for n in streams]
    prefill = [Workload("prefill", n, 1024, 1, max(8, 2 * n), "total_token_throughput") for n in streams]
    return [*decode, *prefill]


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


Runs = dict[Served, list[dict[str, Any]]]  # the client's figures, by repetition


def measure(urls: dict[Served, str], work: Workload, repetitions: int) -> Runs:
    runs: Runs = {served: [] for served in urls}
    for seed in range(repetitions):
        # the order changes too, so that none always runs on the warmer machine
        for served, url in list(urls.items())[:: 1 if seed % 2 else -1]:
            runs[served].append(drive(url, served.path, work, seed))
            print(f"  {work.name}, {served.name}: {runs[served][-1][work.throughput]:.1f} tokens/s", flush=True)
    return runs


def ratio(runs: Runs, served: Served, work: Workload) -> dict[str, float]:
    """Throughput over the first model's, by repetition: median and extremes."""
    pairs = zip(runs[served], next(iter(runs.values())), strict=True)
    ratios = sorted(ours[work.throughput] / theirs[work.throughput] for ours, theirs in pairs)
    return {"median": statistics.median(ratios), "low": ratios[0], "high": ratios[-1]}


def print_table(results: list[tuple[Workload, Runs]]) -> None:
    times = " | ".join(f"{title} ms" for title in SHOWN.values())
    print(f"\n| workload | model | tokens/s | {times} | over the first (low-high) |")
    print("|" + "---|" * (4 + len(SHOWN)))
    for work, runs in results:
        for served, repetitions in runs.items():
            middle = [statistics.median(run[key] for run in repetitions) for key in (work.throughput, *SHOWN)]
            found = ratio(runs, served, work)
            spread = f"**{found['median']:.2f}** ({found['low']:.2f}-{found['high']:.2f})"
            first = served is next(iter(runs))
            figures = " | ".join(f"{figure:.1f}" for figure in middle)
            print(f"| {work.name} | {served.name} | {figures} | {'' if first else spread} |")


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
    parser.add_argument("models", nargs="*", default=DEMO_MODELS, help="folders; the first is what counts as 1")
    parser.add_argument("--streams", type=lambda text: [int(n) for n in text.split(",")], default=[1, 8])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--json", type=Path, help="where to write everything that was measured")
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    options, arguments = parser.parse_args(sys.argv[1:split]), [*SETTINGS, *sys.argv[split + 1 :]]
    signal.signal(signal.SIGTERM, stop)  # so that no server is left behind
    models = [Served.parse(text) for text in options.models]
    if missing := [served.path for served in models if not (served.path / "config.json").exists()]:
        sys.exit(f"{missing[0]} holds no model: name folders, or run `make demo` first")
    results = []
    with ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        urls = {}
        for number, served in enumerate(models):
            print(f"starting vllm serve {served.name} {' '.join(arguments)}", flush=True)
            log = logs / f"{number}.log"
            urls[served] = stack.enter_context(serve(served.path, "--dtype", served.dtype, *arguments, log=log))
        for work in workloads(options.streams):
            results.append((work, measure(urls, work, options.repetitions)))
    print_table(results)
    if options.json:
        everything = [
            {
                "workload": vars(work),
                "model": served.name,
                "over_first": ratio(runs, served, work),
                "repetitions": runs[served],
            }
            for work, runs in results
            for served in runs
        ]
        options.json.write_text(json.dumps({**environment(arguments), "results": everything}))


if __name__ == "__main__":
    main()
