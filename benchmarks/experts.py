"""Layers of routed experts on a GPU: ours as one layer, beside vLLM's fused kernel on bfloat16 weights.

    python benchmarks/experts.py [--json FILE] [--tokens 1,4,16,64,256,1024]
    python benchmarks/experts.py --tiny        a few cells anywhere: in Triton's interpreter without a GPU

Ours has 4 bits, groups of 128 columns and 0.5 % entries or none, and is compared with the reference that runs expert by
expert first. Routers are random. Times are graph replays over several batches, whose experts together exceed the L2.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "kernels"), str(ROOT)]

from benchmarks.kernel_timing.shapes import EXPERTS, Experts  # noqa: E402

Run = Callable[..., Any]  # x, weights, ids -> y
BATCHES = 16
BITS, GROUP = 4, 128
DENSITIES = (0.005, 0.0)
TINY = Experts("tiny", 128, 128, 4, 2)


@dataclass(frozen=True)
class Cell:
    """micros: two runs. weights: the bytes of those experts, bits and all, that a batch reaches, the mean of all."""

    model: str
    kernel: str
    tokens: int
    micros: tuple[float, float]
    weights: float
    error: float | None = None


@dataclass(frozen=True)
class Bench:
    """One model's layer, in a ``kernel_timing.layers.Setting``."""

    model: Experts
    tokens: list[int]
    setting: Any

    def batches(self, count: int) -> list[tuple[Any, Any, Any]]:
        """(x, weights, ids) of ``count`` tokens, others each time."""
        import torch

        device, made = self.setting.device, []
        generator = torch.Generator(device).manual_seed(count)
        for _ in range(BATCHES if self.setting.copies_of else 1):
            x = torch.randn(count, self.model.hidden, device=device, generator=generator).to(self.setting.dtype)
            scores = torch.rand(count, self.model.experts, device=device, generator=generator)
            weights, ids = scores.softmax(-1).topk(self.model.top, -1)
            made.append((x, weights, ids.int()))
        return made

    def cell(self, kernel: str, run: Run, given: list[Any], expert_bytes: float, error: float | None = None) -> Cell:
        from benchmarks.kernel_timing.cells import twice

        micros = twice([partial(run, *batch) for batch in given], self.setting)
        reached = sum(len(ids.unique()) for _, _, ids in given) / len(given)
        return Cell(self.model.name, kernel, len(given[0][0]), micros, reached * expert_bytes, error)

    def weights(self, rows: int, columns: int, density: float) -> list[Any]:
        """One for each expert: the rows of the same layer, each time in another order."""
        import torch

        from benchmarks.kernel_timing import layers
        from benchmarks.kernel_timing.shapes import Shape

        shape = Shape(self.model.name, "expert", rows, columns)
        weight = layers.random_weight(shape, BITS, GROUP, density, self.setting)
        order = torch.arange(rows, device=self.setting.device)
        return [weight.take_rows(order.roll(expert)) for expert in range(self.model.experts)]


def ours(bench: Bench, density: float) -> Iterator[Cell]:
    """Raises ArithmeticError where it computes something else than the reference."""
    from requant_kernels import reference
    from requant_kernels.dense_sparse.triton.experts import RoutedExperts
    from requant_kernels.experts import Expert, run_experts

    from benchmarks.kernel_timing import layers

    model, device = bench.model, bench.setting.device
    gate_up = bench.weights(2 * model.inner, model.hidden, density)
    down = bench.weights(model.hidden, model.inner, density)
    experts = RoutedExperts(gate_up, down, device, None if device.type == "cuda" else layers.INTERPRETED)
    stored = sum(weight.stored_bits() for weight in (gate_up[0], down[0])) / 8

    def linear(weight: Any) -> Any:
        return lambda x: (x @ reference.dequantize(weight).T).to(bench.setting.dtype).float()

    exact = [Expert(linear(first), linear(second)) for first, second in zip(gate_up, down, strict=True)]
    for count in bench.tokens:
        given = bench.batches(count)
        x, shares, ids = given[0]
        error = layers.relative_error(experts(*given[0]), run_experts(x.float(), shares, ids, exact))
        yield bench.cell(f"W{BITS} g{GROUP}, {density:.1%}", experts, given, stored, error)


def vllms(bench: Bench) -> Iterator[Cell]:
    """Raises ImportError where vLLM is not there."""
    import torch
    from vllm.model_executor.layers.fused_moe import fused_experts

    model, like = bench.model, {"dtype": bench.setting.dtype, "device": bench.setting.device}
    gate_up = torch.randn(model.experts, 2 * model.inner, model.hidden, **like)
    down = torch.randn(model.experts, model.hidden, model.inner, **like)
    expert_bytes = 6 * model.inner * model.hidden
    for count in bench.tokens:
        given = bench.batches(count)
        yield bench.cell(
            "vLLM, bfloat16", lambda *batch: fused_experts(batch[0], gate_up, down, *batch[1:]), given, expert_bytes
        )


def show(cells: list[Cell]) -> str:
    from requant.markdown import table

    base = {(cell.model, cell.tokens): min(cell.micros) for cell in cells if cell.kernel.startswith("vLLM")}
    rows = []
    for cell in cells:
        time, peer = min(cell.micros), base.get((cell.model, cell.tokens))
        rate = f"{cell.weights / time / 1e3:.0f}"
        speed = f"{peer / time:.2f}" if peer else ""
        rows.append((cell.model, str(cell.tokens), cell.kernel, f"{time:.1f}", rate, speed))
    return table(("model", "tokens", "kernel", "us a layer", "GB/s of weights", "x bfloat16"), rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tokens", default="1,4,16,64,256,1024")
    parser.add_argument("--tiny", action="store_true", help="a few cells, whose times mean nothing without a GPU")
    options = parser.parse_args()
    import torch

    gpu = torch.cuda.is_available()
    if not gpu and not options.tiny:
        print("no CUDA device: only --tiny runs here")
        return 1
    if not gpu:
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which is below
    from benchmarks.kernel_timing.layers import Setting
    from benchmarks.kernel_timing.recording import write_json

    setting = Setting(torch.device("cuda" if gpu else "cpu"), torch.bfloat16 if gpu else torch.float16)
    tokens = [1, 6] if options.tiny else [int(count) for count in options.tokens.split(",")]
    cells: list[Cell] = []
    try:
        for model in (TINY,) if options.tiny else EXPERTS:
            bench = Bench(model, tokens, setting)
            try:
                cells += vllms(bench) if gpu else ()
            except ImportError as error:
                print(f"vLLM: not measured: {error}")
            for density in DENSITIES:
                cells += ours(bench, density)
    finally:
        print(show(cells))
        if options.json:
            about = {"device": torch.cuda.get_device_name() if gpu else "interpreted", "torch": torch.__version__}
            write_json(options.json, about | {"cells": [asdict(cell) for cell in cells]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
