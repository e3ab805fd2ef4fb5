"""How the path integral's time and memory grow with layers, intervals and samples.

    python benchmarks/growth.py [--hidden 512] [--length 256]

Llama-shaped models of random weights; the original and the rounded weights and the accumulators lie on disk, as with
--offload-folder. Memory: the most anonymous memory while integrating, less that of the loaded model before it. Each row
is a process of its own. Linux only.
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

import torch
from requant.markdown import table
from requant.sensitivity import pqi
from requant.sensitivity.quadrature import nodes
from requant.sensitivity.store import offloaded
from requant_kernels.rounding import rtn
from requant_kernels.scheme import WeightScheme
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.anonymous import Peak, anonymous_bytes

GRID = WeightScheme(4, 64, symmetric=False)
MIB = 2**20


@dataclass(frozen=True)
class Case:
    hidden: int
    length: int
    layers: int = 4
    intervals: int = 2
    samples: int = 4


@dataclass(frozen=True)
class Cost:
    """gradients: bytes of all gradients of the model at once."""

    seconds: float
    memory: int
    gradients: int


def measure(case: Case) -> Cost:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=case.hidden,
        intermediate_size=3 * case.hidden,
        num_hidden_layers=case.layers,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    model = LlamaForCausalLM(config).requires_grad_(False)
    blocks = list(model.model.layers)
    weights = {name: one for name, one in model.named_parameters() if name.endswith("_proj.weight")}
    samples = list(torch.randint(0, 512, (case.samples, 1, case.length)))
    with tempfile.TemporaryDirectory() as folder, offloaded(Path(folder)) as stores:
        start, end = stores(), stores()
        for name, weight in weights.items():
            start.copy(name, weight.data)
            end.copy(name, rtn.quantize(weight.data, GRID, dtype=torch.bfloat16).dequantize())

        def loss(ids: torch.Tensor) -> torch.Tensor:
            return model(input_ids=ids, labels=ids, use_cache=False).loss

        path = pqi.Path(blocks, weights, loss, start, end, stores)
        path.loss_at(0.0, samples[:1])  # what the first pass of any kind leaves behind is not the integral's
        before, began = anonymous_bytes(), time.process_time()
        with Peak() as peak:
            path.gradients(samples, nodes("midpoint", case.intervals), second_moment=True)
        seconds = time.process_time() - began
    return Cost(seconds, peak.most - before, sum(weight.nbytes for weight in weights.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--length", type=int, default=256, help="tokens of each sample")
    arguments = parser.parse_args()
    least = Case(arguments.hidden, arguments.length)
    cases = [replace(least, layers=layers) for layers in (4, 8, 16)]
    cases += [replace(least, intervals=count) for count in (4, 8)] + [
        replace(least, samples=count) for count in (8, 16)
    ]
    # glibc then gives freed tensors back at once; held ones would count as memory
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(MIB // 4)
    rows = []
    for case in cases:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            cost = pool.submit(measure, case).result()
        sizes = (f"{size / MIB:.0f}" for size in (cost.memory, cost.gradients))
        rows.append((str(case.layers), str(case.intervals), str(case.samples), f"{cost.seconds:.1f}", *sizes))
    head = ("layers", "N", "n", "processor seconds", "memory beside the model, MiB", "all gradients at once, MiB")
    print(table(head, rows))


if __name__ == "__main__":
    main()
