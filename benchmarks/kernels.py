"""The GPU kernels against the reference, then against cuBLAS, on the linear layers of real models.

    python benchmarks/kernels.py --json out.json          the whole table on this GPU (under 9 minutes)
    python benchmarks/kernels.py --model Llama-3.1-8B     some models only
    python benchmarks/kernels.py --w8a8                   W8A8 layers instead, beside int8 cuBLAS and vLLM's cutlass
    python benchmarks/kernels.py --uneven                 entries crowd in some rows, as in trained models
    python benchmarks/kernels.py --tune h200.json         search launch configurations, write them as a table (4 bit;
                                                          --bits 2 --bits 3 --tokens 16: of those, up to 16 tokens)
    python benchmarks/kernels.py --tiny                   a few cells anywhere: in Triton's interpreter without a GPU

Every configuration is compared with the reference before it is timed: graph replays over copies of the layer that
together exceed the L2 cache, twice. Needs torch and triton >= 3.6, nothing installed; where vLLM, conch, humming or
gemlite can be imported, their kernels for weights of few bits are checked and timed as well.

The most important comes first, and nothing that was measured is lost: the files are rewritten while it goes on, also
when it is terminated; what fails costs its own cells and makes the exit status 1; what the time did not allow is named.
"""

import argparse
import contextlib
import json
import os
import platform
import signal
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "kernels"), str(ROOT)]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help="may be repeated; default: all")
    parser.add_argument("--seconds", type=float, default=500, help="begin nothing after this time (default 500)")
    parser.add_argument("--json", type=Path, help="write all cells and failures there")
    parser.add_argument("--tune", type=Path, metavar="FILE", help="write the fastest launch table there instead")
    parser.add_argument("--bits", type=int, action="append", choices=(2, 3, 4, 8), help="to tune; may be repeated")
    parser.add_argument("--tokens", type=int, default=1024, help="tune no tile of more (default 1024)")
    parser.add_argument("--w8a8", action="store_true", help="int8 layers instead of dense-plus-sparse ones")
    parser.add_argument("--uneven", action="store_true", help="rows have as many entries as those of trained models")
    parser.add_argument("--tiny", action="store_true", help="a few cells, whose times mean nothing without a GPU")
    return parser.parse_args()


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
        "entries": "uneven" if setting.uneven else "even",
        "timings_mean_something": gpu,
    }


def show(record: Any) -> None:
    """Prints the tables of what was measured, and what failed."""
    from benchmarks.kernel_timing import tables

    models = dict.fromkeys(cell.model for cell in record.cells)
    for model in models:
        measured = [cell for cell in record.cells if cell.model == model]
        print("\n".join([model, *tables.lines(measured, record.about["ceilings"]["copy_bytes_per_s"]), ""]))
    for model in models:
        print("\n".join(tables.bars(record.cells, model, record.about["ceilings"]["copy_bytes_per_s"])))
    print(json.dumps(record.about))
    for failure in record.failures:
        print(f"{failure['unit']}: FAILED: {failure['error']}")


def compile_before(tasks: dict[str, Any], device: Any, deadline: float) -> None:
    """Compiles in parallel for half of the time at most; what is missing then is compiled when it is measured."""
    from benchmarks.kernel_timing import compilation

    begun = time.monotonic()
    failures = compilation.compile_all(
        list(tasks.values()), compilation.workers(device), device, (deadline - begun) / 2
    )
    print(f"compiled in {time.monotonic() - begun:.0f} s")
    for name, failure in zip(tasks, failures, strict=True):
        if failure:
            print(f"  {name}: {failure}")


def measure(options: argparse.Namespace, setting: Any, deadline: float) -> int:
    """What the options ask for; the exit status. Whatever was measured is written and shown, however it ends."""
    from benchmarks.kernel_timing import clock, recording, shapes, units

    models = {"tiny": shapes.TINY} if options.tiny else shapes.MODELS
    plan = units.Plan([models[name] for name in options.model or models], setting)
    if options.tiny:
        tokens = (1, 20) if options.w8a8 else (1, 20, 70)
        plan = replace(plan, tokens=tokens, schemes=plan.schemes[:2], rare=())
    record = recording.Record(options.json, environment(setting))
    with contextlib.ExitStack() as stack:
        try:
            record.about["ceilings"] = clock.ceilings(setting.device)
            if setting.device.type == "cuda":
                compile_before(units.compilations(plan, integers=options.w8a8), setting.device, deadline)
            wanted = units.w8a8(plan) if options.w8a8 else units.dense_sparse(plan, stack)
            recording.run(wanted, record, setting.device, deadline)
        finally:
            record.write()
            show(record)
    return 1 if record.failures else 0


def tune(options: argparse.Namespace, setting: Any, deadline: float) -> int:
    """One width after the other, each on the table that the one before has written; the exit status."""
    from benchmarks.kernel_timing import shapes, tuning

    in_use, status, widths = tuning.table_in_use(setting), 0, options.bits or [4]
    for place, bits in enumerate(widths):
        now = time.monotonic()
        until = now + (deadline - now) / (len(widths) - place)
        search = tuning.Search(bits, shapes.MODELS["Llama-3.1-8B"], options.tokens, until, options.tune)
        failed, in_use = tuning.tune(search, in_use, setting)
        status = status or failed
    return status


def main() -> int:
    options = arguments()
    deadline = time.monotonic() + options.seconds
    import torch

    gpu = torch.cuda.is_available()
    if not gpu and (options.tune or not options.tiny):
        print("no CUDA device: only --tiny runs here")
        return 1
    if not gpu:
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which is below
    from benchmarks.kernel_timing.layers import Setting

    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # what is cut short has said what it found
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends like an exception: all is written
    # the interpreter does not compute bfloat16
    dtype = torch.bfloat16 if gpu else torch.float16
    setting = Setting(torch.device("cuda" if gpu else "cpu"), dtype, uneven=options.uneven)
    torch.backends.cuda.matmul.allow_tf32 = False
    if options.tune:
        return tune(options, setting, deadline)
    return measure(options, setting, deadline)


if __name__ == "__main__":
    sys.exit(main())
