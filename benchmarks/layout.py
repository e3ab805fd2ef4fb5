"""How long a model's layers take from the file's layout to the Triton kernels', and the memory that takes.

    python benchmarks/layout.py [--model Llama-3.1-8B] [--density 0.005] [--threads 1]

The conversion runs where the layer will: on the GPU where there is one, else on the CPU, whose processor time is then
told. Each linear layer of one block is converted; seconds are those of one block times the number of blocks. "Beyond"
is the most memory during any conversion, less the layer in both layouts (without a GPU: anonymous memory, Linux only),
in a second run: memory is counted right only where glibc gives it back at once, and then costs time.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

import torch
from requant.markdown import table
from requant_kernels.dense_sparse.triton.layer import build

from benchmarks.anonymous import Peak, anonymous_bytes
from benchmarks.kernel_timing.layers import Setting, random_weight, size
from benchmarks.kernel_timing.shapes import MODELS, SCHEMES, Shape

BLOCKS = {"Llama-3.1-8B": 32, "Llama-3.2-1B": 16, "70B TP=4": 80, "Qwen3-32B": 64}
MIB = 2**20
TIMES = "LAYOUT_SECONDS"  # of the first run, for the second


def convert(shape: Shape, scheme: str, density: float, setting: Setting) -> tuple[float, int, int, int]:
    """Seconds; bytes of the file's layout, of the kernels', and of memory beyond both."""
    weight = random_weight(shape, *SCHEMES[scheme], density, setting)
    gpu = setting.device.type == "cuda"
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    clock = time.perf_counter if gpu else time.process_time
    before, started = torch.cuda.memory_allocated() if gpu else anonymous_bytes(), clock()
    with Peak() as peak:
        tensors, _ = build(weight)
        if gpu:
            torch.cuda.synchronize()
        seconds = clock() - started
    most = torch.cuda.max_memory_allocated() if gpu else peak.most
    made = size(list(tensors.values()))
    return seconds, size(list(weight.to_tensors().values())), made, most - before - made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="Llama-3.1-8B")
    parser.add_argument("--density", type=float, default=0.005)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    setting = Setting(torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.bfloat16)
    blocks = BLOCKS[arguments.model]
    convert(MODELS[arguments.model][0], "W4 g128", arguments.density, setting)  # warms up
    shapes = MODELS[arguments.model]
    found = {scheme: [convert(shape, scheme, arguments.density, setting) for shape in shapes] for scheme in SCHEMES}
    if TIMES not in os.environ:
        seconds = {scheme: sum(one[0] for one in layers) * blocks for scheme, layers in found.items()}
        again = {"MALLOC_MMAP_THRESHOLD_": str(MIB // 4), TIMES: json.dumps(seconds)}
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | again)
    rows = []
    for scheme, seconds in json.loads(os.environ[TIMES]).items():
        stored, made = (sum(one[k] for one in found[scheme]) * blocks for k in (1, 2))
        beyond = max(one[3] for one in found[scheme])
        rows.append((scheme, f"{seconds:.1f}", *(f"{part / MIB:.0f}" for part in (stored, made, beyond))))
    print(table(("scheme", "seconds", "file, MiB", "kernels, MiB", "beyond one layer, MiB"), rows))


if __name__ == "__main__":
    main()
