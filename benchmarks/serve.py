"""Served throughput of a quantized checkpoint against its original, side by side in one run.

    python benchmarks/serve.py [QUANTIZED] [--against MODEL] [--repeats 3] [--json FILE] [--serve=--enforce-eager ...]

Both are served at the same time with the same settings (an idle server takes no processor time) and driven in turn
by vLLM's own benchmark client, so that a change of the machine's speed meets both. Ratios are of medians; their
spread is that of the pairs. Needs no network. Without arguments: the two models of `make demo`.
"""

import argparse
import contextlib
import io
import json
import platform
import statistics
import sys
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import vllm
from vllm.benchmarks.serve import add_cli_args
from vllm.benchmarks.serve import main as run_client

from vllm_requant.server import serve

DEMO = Path(__file__).resolve().parent.parent / "demo" / "SmolLM2-135M-Instruct"
# Random prompts are the same in every repetition: prefix caching would answer them from memory.
SERVE = ("--no-enable-prefix-caching", "--max-model-len", "2048", "--dtype", "bfloat16")


@dataclass(frozen=True)
class Load:
    """``streams`` requests at a time, ``requests`` in all, of fixed lengths in tokens."""

    name: str
    streams: int
    requests: int
    prompt: int
    answer: int
    metric: str  # of vLLM's client, in tokens per second


LOADS = (
    Load("decode, 1 stream", 1, 3, 16, 96, "output_throughput"),
    Load("decode, 8 streams", 8, 16, 16, 96, "output_throughput"),
    Load("prefill", 4, 8, 1024, 1, "total_token_throughput"),
)


def measure(load: Load, url: str, model: Path, seed: int) -> dict[str, Any]:
    """One run of vLLM's client. Exits where a request failed: its figures would mean nothing."""
    parser = argparse.ArgumentParser()
    add_cli_args(parser)
    arguments = {
        "--backend": "openai",
        "--base-url": url,
        "--endpoint": "/v1/completions",
        "--model": str(model),
        "--dataset-name": "random",
        "--random-input-len": load.prompt,
        "--random-output-len": load.answer,
        "--num-prompts": load.requests,
        "--max-concurrency": load.streams,
        "--seed": seed,
    }
    words = [str(word) for pair in arguments.items() for word in pair]
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        result = run_client(parser.parse_args([*words, "--ignore-eos", "--disable-tqdm"]))
    if result["failed"] or result["completed"] != load.requests:
        sys.exit(f"{model}: {result['failed']} of {load.requests} requests failed\n{output.getvalue()}")
    return result


def compare(servers: dict[str, tuple[str, Path]], repeats: int) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """load -> model -> one result a repetition; the first, uncounted repetition warms both up."""
    results: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for load in LOADS:
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in servers}
        for repeat in range(repeats + 1):
            for name, (url, model) in servers.items():
                result = measure(load, url, model, seed=repeat)
                print(f"{load.name:18} {name:10} {result[load.metric]:8.1f} tokens/s", file=sys.stderr, flush=True)
                if repeat:
                    runs[name].append(result)
        results[load.name] = runs
    return results


def summary(load: Load, runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    quantized, original = ([run[load.metric] for run in runs[name]] for name in ("quantized", "original"))
    pairs = [mine / other for mine, other in zip(quantized, original, strict=True)]
    medians = statistics.median(quantized), statistics.median(original)
    latencies = {
        f"{name}_{metric}": statistics.median(run[metric] for run in runs[name])
        for name in runs
        for metric in ("median_ttft_ms", "median_itl_ms", "p99_itl_ms")
    }
    return {
        "quantized_tokens_per_s": medians[0],
        "original_tokens_per_s": medians[1],
        "ratio": medians[0] / medians[1],
        "ratio_spread": [min(pairs), max(pairs)],
        **latencies,
    }


def environment(arguments: tuple[str, ...]) -> dict[str, Any]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "device": device,
        "threads": torch.get_num_threads(),
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "serve": " ".join(arguments),
    }


def processor() -> str:
    """The processor's name and the vector instructions that decide its speed."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()} ({torch.backends.cpu.get_cpu_capability()})"
    return platform.processor()


def table(report: dict[str, Any]) -> str:
    lines = ["| load | quantized, tokens/s | original, tokens/s | ratio | spread |", "|---|---|---|---|---|"]
    for name, row in report["loads"].items():
        low, high = row["ratio_spread"]
        lines.append(
            f"| {name} | {row['quantized_tokens_per_s']:.1f} | {row['original_tokens_per_s']:.1f} "
            f"| {row['ratio']:.2f}x | {low:.2f}-{high:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("quantized", type=Path, nargs="?", default=DEMO.with_name(f"{DEMO.name}-requant-w4"))
    parser.add_argument("--against", type=Path, default=DEMO)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", action="append", default=[], help="a further argument of both `vllm serve`")
    options = parser.parse_args()
    for folder in (options.quantized, options.against):
        if not (folder / "config.json").is_file():
            sys.exit(f"{folder}: no model there; `make demo` makes the default ones")
    arguments = (*SERVE, *options.serve)
    with contextlib.ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers = {}
        for name, model in (("quantized", options.quantized), ("original", options.against)):
            print(f"starting {model}", file=sys.stderr, flush=True)
            url = stack.enter_context(serve(model, *arguments, log=logs / f"{name}.log"))
            servers[name] = (url, model)
        results = compare(servers, options.repeats)
    report = {
        "environment": environment(arguments) | {"repeats": options.repeats},
        "loads": {load.name: summary(load, results[load.name]) for load in LOADS},
    }
    print(table(report))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
