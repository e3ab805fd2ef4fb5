"""How long the shipped kernels take by their machine code, without a GPU (benchmarks/prediction).

    python benchmarks/predict.py                          a block of Llama-3.1-8B on an H200, 0.5 % entries and none
    python benchmarks/predict.py --gpu a100 --tokens 16,64 --scheme "W3 g128"
    python benchmarks/predict.py --tokens 16 --tile '{"kernel": "middle", "up_to": 16, "tokens": 16, "strips": 4,
        "stages": 3, "programs": 528, "span": 128}'       another tile than the table's

The compiler is the installed Triton; vLLM 0.32 brings 3.6 to a GPU. Where no tile is for so many tokens, weights
are decoded and multiplied. Seconds of a processor of this machine for each cell, minutes for all. bfloat16, whose
library may split columns, is not charged for processors that are idle.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent / folder) for folder in ("kernels", "offline", ".")]

import triton
from requant.markdown import table
from requant_kernels.dense_sparse.triton.table import Tile, tables

from benchmarks.kernel_timing.shapes import MODELS, SCHEMES, TOKENS, Load
from benchmarks.prediction.gpus import GPUS
from benchmarks.prediction.launches import Predictor, product_seconds

DENSITY = 0.005
COLUMNS = ("tokens", "scheme", "us", "x bf16", "without entries", "entries cost", "each layer")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", choices=GPUS, default="h200")
    parser.add_argument("--model", choices=MODELS, default="Llama-3.1-8B")
    parser.add_argument("--tokens", type=lambda text: [int(number) for number in text.split(",")], default=TOKENS)
    parser.add_argument("--scheme", choices=SCHEMES, action="append", help="may be repeated; default: all")
    parser.add_argument("--tile", type=json.loads, help="as the tables' JSON has them")
    parser.add_argument("--waits", type=int, default=0, help="before how many instructions warps wait longest")
    arguments = parser.parse_args()
    gpu, launches = GPUS[arguments.gpu], tables()[arguments.gpu]
    if arguments.tile:
        launches = replace(launches, tiles=(Tile(**arguments.tile),))
    predict, rows = Predictor(gpu, launches), list[list[object]]()
    for tokens in arguments.tokens:
        for scheme in arguments.scheme or SCHEMES:
            loads = [Load(shape, *SCHEMES[scheme], DENSITY, tokens) for shape in MODELS[arguments.model]]
            times = [predict(load) for load in loads]
            bare = sum(predict(replace(load, density=0.0)) for load in loads)
            plain = sum(product_seconds(gpu, load.shape.rows, load.shape.columns, tokens) for load in loads)
            each = " / ".join(f"{time * 1e6:.1f}" for time in times)
            total = sum(times)
            cost = f"{total / bare - 1:+.1%}"
            rows.append([tokens, scheme, f"{total * 1e6:.1f}", f"{plain / total:.2f}", f"{bare * 1e6:.1f}", cost, each])
            print(*rows[-1], file=sys.stderr, flush=True)
    print(f"{gpu.name}, {arguments.model}, {DENSITY:.1%} entries, triton {triton.__version__}\n")
    print(table(COLUMNS, rows))
    if arguments.waits:
        total = predict.waits.total()
        most = [
            [line, name, f"{waited / total:.0%}"] for (line, name), waited in predict.waits.most_common(arguments.waits)
        ]
        print("\nOf the cycles that warps wait, with entries and without:\n")
        print(table(("line", "instruction", "share"), most))
    return 0


if __name__ == "__main__":
    sys.exit(main())
