"""How far predictions from machine code are off where launches were measured (benchmarks/prediction/measured.py).

    python benchmarks/fit.py                               blocks of Llama-3.1-8B on an H200
    python benchmarks/fit.py --set issue=1.4 --set l2=40   with other numbers of gpus.py
    python benchmarks/fit.py --tokens 1,64                 of these alone

Half a minute. The numbers of gpus.py are chosen by 1, 16 and 64 tokens; 4 tokens were looked at afterwards.
"""

import argparse
import math
import sys
from dataclasses import fields, replace
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent / folder) for folder in ("kernels", "offline", ".")]

from requant.markdown import table

from benchmarks.prediction.gpus import H200
from benchmarks.prediction.measured import blocks, launches, predicted

COLUMNS = ("tokens", "scheme", "entries", "us", "measured", "off", "each layer, off", "cycles with an instruction")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=NUMBER", help="may be repeated")
    parser.add_argument("--tokens", type=lambda text: [int(number) for number in text.split(",")])
    arguments = parser.parse_args()
    types = {field.name: type(getattr(H200, field.name)) for field in fields(H200)}
    changes = {}
    for name, _, number in (one.partition("=") for one in arguments.set):
        if types.get(name) not in (int, float):
            parser.error(f"--set {name}: no number of gpus.py")
        changes[name] = types[name](number)
    gpu = replace(H200, **changes)
    rows, of_blocks, of_layers = list[list[object]](), list[float](), list[float]()
    for (tokens, scheme, density), layers in blocks(launches()).items():
        if arguments.tokens and tokens not in arguments.tokens:
            continue
        runs = [predicted(launch, gpu) for launch in layers]
        ratios = [run.seconds * 1e6 / launch.micros for run, launch in zip(runs, layers, strict=True)]
        total, was = sum(run.seconds * 1e6 for run in runs), sum(launch.micros for launch in layers)
        of_blocks.append(math.log(total / was))
        of_layers += [math.log(ratio) for ratio in ratios]
        off = " / ".join(f"{ratio - 1:+.0%}" for ratio in ratios)
        issued = " / ".join(f"{run.issued:.0%}" for run in runs)
        rows.append(
            [tokens, scheme, f"{density:.1%}", f"{total:.1f}", f"{was:.1f}", f"{total / was - 1:+.0%}", off, issued]
        )
        print(*rows[-1], file=sys.stderr, flush=True)
    print(table(COLUMNS, rows))
    for what, logs in (("blocks", of_blocks), ("layers", of_layers)):
        print(f"{what}: {math.sqrt(sum(one * one for one in logs) / len(logs)):.1%} off, root of the mean square")
    return 0


if __name__ == "__main__":
    sys.exit(main())
