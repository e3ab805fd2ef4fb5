"""What the shipped kernels ask of a GPU's memories, counted on the emulated one (tests/emulator), without a GPU.

    python benchmarks/traffic.py --tokens 4              a tile of the H200's table on a small layer, W4 g128
    python benchmarks/traffic.py --tokens 64 --gpu a100 --bits 3 --density 0
    python benchmarks/traffic.py --tokens 4 --tile '{"kernel": "middle", "up_to": 4, "tokens": 16, "strips": 8,
        "stages": 3, "programs": 1}'                     another tile than the table's

A row for each line of source that accesses memory, those first that keep shared memory or the first level cache busy
longest: warps that run it, cycles of shared memory and how many would do without conflicts of banks, sectors of 32
bytes and lines of 128 of global memory. The last rows are each kernel's sums and all its instructions (of PTX).
"""

import argparse
import json
import sys
from collections import defaultdict
from dataclasses import astuple, replace
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent / folder) for folder in ("kernels", "offline", ".")]

import torch
from requant.markdown import table
from requant_kernels.dense_sparse.triton.implementation import Triton
from requant_kernels.dense_sparse.triton.table import Tile, tables
from requant_kernels.dense_sparse.triton.variants import TARGETS

from benchmarks.kernel_timing import layers
from benchmarks.kernel_timing.shapes import Shape
from tests.emulator.driver import emulated
from tests.emulator.traffic import Traffic

COLUMNS = ("kernel", "line", "operation", "runs", "cycles", "least", "sectors", "lines")


def rows(traffic: Traffic) -> list[list[object]]:
    busy = sorted(traffic.counts.items(), key=lambda item: -max(item[1].cycles, item[1].lines))
    found: list[list[object]] = [[*key, *astuple(count)] for key, count in busy if count.cycles or count.lines]
    sums: dict[str, list[int]] = defaultdict(lambda: [0] * 5)
    for (kernel, _, _), count in traffic.counts.items():
        sums[kernel] = [a + b for a, b in zip(sums[kernel], astuple(count), strict=True)]
    return found + [[kernel, "all", "", *numbers] for kernel, numbers in sums.items()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", choices=("h200", "a100"), default="h200")
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--bits", type=int, choices=(2, 3, 4, 8), default=4)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--density", type=float, default=0.005)
    parser.add_argument("--uneven", action="store_true", help="entries crowd in some rows, as in trained models")
    parser.add_argument("--tile", type=json.loads, help="as the tables' JSON has them")
    arguments = parser.parse_args()
    setting = layers.Setting(torch.device("cpu"), torch.bfloat16, arguments.uneven)
    shape = Shape("", "", arguments.rows, arguments.columns)
    weight = layers.random_weight(shape, arguments.bits, arguments.group, arguments.density, setting)
    launches = tables()[arguments.gpu]
    if arguments.tile:
        launches = replace(launches, tiles=(Tile(**arguments.tile),))
    implementation = Triton(launches)
    prepared = layers.prepare(implementation, weight, setting)
    x, traffic = layers.activations(arguments.tokens, shape, setting), Traffic()
    with emulated(int(TARGETS[arguments.gpu][0]), traffic=traffic):
        y = implementation.apply(x, list(prepared.tensors.values()), None, shape.rows, list(prepared.meta))
    layers.relative_error(y, x.float() @ layers.exact_weight(weight).T)
    print(table(COLUMNS, rows(traffic)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
