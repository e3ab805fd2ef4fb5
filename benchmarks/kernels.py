"""The GPU kernels against the reference, then against cuBLAS, on the linear layers of real models.

    python benchmarks/kernels.py --json out.json          the whole table on this GPU (under 9 minutes)
    python benchmarks/kernels.py --model Llama-3.1-8B     some models only
    python benchmarks/kernels.py --w8a8                   W8A8 layers instead, beside int8 cuBLAS and vLLM's cutlass
    python benchmarks/kernels.py --tune h200.json         search launch configurations, write them as a table
    python benchmarks/kernels.py --tiny                   a few cells anywhere: in Triton's interpreter without a GPU

Every configuration is compared with the reference before it is timed: graph replays over copies of the layer that
together exceed the L2 cache, twice. Needs torch and triton >= 3.6, nothing installed; where vLLM, conch, humming or
gemlite can be imported, their kernels for weights of few bits are checked and timed as well.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "kernels"), str(ROOT)]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help="may be repeated; default: all")
    parser.add_argument("--seconds", type=float, default=500, help="start no layer after this time (default 500)")
    parser.add_argument("--json", type=Path, help="write all cells there")
    parser.add_argument("--tune", type=Path, metavar="FILE", help="write the fastest launch table there instead")
    parser.add_argument("--w8a8", action="store_true", help="int8 layers instead of dense-plus-sparse ones")
    parser.add_argument("--tiny", action="store_true", help="a few cells, whose times mean nothing without a GPU")
    return parser.parse_args()


def measure(options: argparse.Namespace, setting: Any, models: dict[str, Any]) -> Iterator[Any]:
    """Cells, as they come; layers that the time does not allow are named and left out."""

    from benchmarks.kernel_timing import cells, compilation, peers, shapes

    begun = time.monotonic()
    deadline = begun + options.seconds
    tokens = (1, 20, 70) if options.tiny else shapes.TOKENS
    schemes = list(shapes.SCHEMES)[: 2 if options.tiny else None]
    densities = (0.0, 0.005) if options.tiny else shapes.DENSITIES
    if setting.device.type == "cuda":
        jobs = [
            compilation.Job(shape, bits, group, density, tokens)
            for shape in (shape for model in models.values() for shape in model)
            for bits, group in shapes.SCHEMES.values()
            for density in (0.0, 0.005)
        ]
        failures = [failure for failure in compilation.compile_all(jobs, setting) if failure]
        print(f"compiled in {time.monotonic() - begun:.0f} s{'; FAILED: ' + failures[0] if failures else ''}")
    for model in models.values():
        for shape in model:
            if time.monotonic() > deadline:
                print(f"{shape.model} {shape.layer}: not measured, the time is used up")
                continue
            yield from cells.unquantized(shape, tokens, setting)
            for scheme in schemes:
                for density in densities:
                    yield from cells.quantized(shape, scheme, density, tokens, setting)
    yield from peers.everything([one for model in models.values() for one in model], tokens, setting, deadline)


def measure_int8(options: argparse.Namespace, setting: Any, models: dict[str, Any]) -> Iterator[Any]:
    """Cells of W8A8 layers; those that the time does not allow are named and left out."""
    from benchmarks.kernel_timing import cells, int8, shapes

    deadline = time.monotonic() + options.seconds
    tokens = (1, 20) if options.tiny else shapes.TOKENS
    for shape in (shape for model in models.values() for shape in model):
        if time.monotonic() > deadline:
            print(f"{shape.model} {shape.layer}: not measured, the time is used up")
            continue
        yield from cells.unquantized(shape, tokens, setting)
        yield from int8.everything(shape, tokens, setting)


def separate_sparse(setting: Any, models: dict[str, Any]) -> Iterator[Any]:
    """The vendor's sparse product, last: where it does not run under graph capture, nothing else is lost."""
    from benchmarks.kernel_timing import cells

    for shape in (shape for model in models.values() for shape in model):
        try:
            yield from cells.separate_sparse(shape, 0.005, (1, 16, 64), setting)
        except RuntimeError as error:
            print(f"{shape.model} {shape.layer}: CSR not measured: {str(error).splitlines()[0]}")
            return


def environment(setting: Any) -> dict[str, Any]:
    import torch
    import triton

    gpu = setting.device.type == "cuda"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(setting.device) if gpu else f"{platform.processor()}, interpreted",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "dtype": str(setting.dtype),
        "timings_mean_something": gpu,
    }


def main() -> int:
    options = arguments()
    import torch

    gpu = torch.cuda.is_available()
    if not gpu and not options.tiny:
        print("no CUDA device: only --tiny runs here")
        return 1
    if not gpu:
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which is below
    from benchmarks.kernel_timing import clock, shapes, tables, tuning
    from benchmarks.kernel_timing.layers import Setting

    # the interpreter does not compute bfloat16
    setting = Setting(torch.device("cuda" if gpu else "cpu"), torch.bfloat16 if gpu else torch.float16)
    torch.backends.cuda.matmul.allow_tf32 = False
    if options.tune:
        table, log = tuning.tune(shapes.MODELS["Llama-3.1-8B"], setting)
        options.tune.write_text(json.dumps(table, indent=2) + "\n")
        print("\n".join(log))
        return 0
    models = {"tiny": shapes.TINY} if options.tiny else shapes.MODELS
    models = {name: models[name] for name in options.model or models}
    report: dict[str, Any] = environment(setting) | {"ceilings": clock.ceilings(setting.device)}
    if options.w8a8:
        measured = list(measure_int8(options, setting, models))
    else:
        measured = [*measure(options, setting, models), *separate_sparse(setting, models)]
    copy = report["ceilings"]["copy_bytes_per_s"]
    for model in models:
        print("\n".join([model, *tables.lines([cell for cell in measured if cell.model == model], copy), ""]))
    for model in models:
        print("\n".join(tables.bars(measured, model, copy)))
    print(json.dumps(report))
    if options.json:
        options.json.write_text(json.dumps(report | {"cells": [asdict(cell) for cell in measured]}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
