"""The quantized products of a CPU beside the unquantized ones that vLLM runs there, on the layers of real models.

    python benchmarks/cpu_kernels.py [--shapes 960x576,3072x576,…] [--tokens 1,8,64,512] [--threads 1] [--seconds 1]
                                     [--only cpu_bf16]

Prints a Markdown table: microseconds of processor time for one layer with bfloat16 inputs (float32: with its own), and
how often an unquantized bfloat16 layer takes that. Each cell is the least of several runs, which alternate between the
columns, over copies of the layer that together exceed the last-level cache. Every product is compared with the
reference before it is timed; what this processor can not run is left out, and the reason printed.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from requant.markdown import table
from requant_kernels import reference
from requant_kernels.dense_sparse import dispatch as dense_sparse
from requant_kernels.dense_sparse.interface import LayerConfig as DenseSparseConfig
from requant_kernels.rounding.layer import round_layer
from requant_kernels.scheme import W8A8_WEIGHTS, ActivationScheme, LayerScheme, SparseScheme, WeightScheme
from requant_kernels.sparse import SparsePart
from requant_kernels.w8a8 import dispatch as w8a8
from requant_kernels.w8a8.interface import LayerConfig as W8A8Config
from requant_kernels.weight import DenseSparseWeight

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]
from benchmarks.kernel_timing.layers import Setting  # noqa: E402
from benchmarks.kernel_timing.peers import vllm_kernel, vllm_ready  # noqa: E402

Call = Callable[[], torch.Tensor]
CPU = torch.device("cpu")
DTYPE = torch.bfloat16
CACHE_BYTES = 64 << 20  # more than the last-level cache of most machines
SHAPES = "960x576,3072x576,576x1536,49152x576,16384x2048,2048x8192"  # SmolLM2-135M, then Llama-3.2-1B's MLP
ENTRIES = "0.5 % entries"
SCHEMES = {
    **{f"W{bits} g64": LayerScheme(WeightScheme(bits, 64, symmetric=False)) for bits in (4, 3, 2)},
    f"W4 g64, {ENTRIES}": LayerScheme(WeightScheme(4, 64, symmetric=False), SparseScheme()),
    "W8A8": LayerScheme(W8A8_WEIGHTS, None, ActivationScheme(dynamic=True)),
    "W8A8 asymmetric": LayerScheme(W8A8_WEIGHTS, None, ActivationScheme(dynamic=True, symmetric=False)),
}
VLLM = "W4 g64 symmetric, vLLM"
QUANTIZED = [
    *(("cpu_bf16", kind) for kind in ("W4 g64", f"W4 g64, {ENTRIES}", "W3 g64", "W2 g64")),
    ("cpu_int4_native", "W4 g64"),
    *((name, kind) for name in ("cpu_int8_avx512", "cpu_int8_avx2", "onednn") for kind in ("W8A8", "W8A8 asymmetric")),
    ("fbgemm", "W8A8"),
]


def unquantized(weight: torch.Tensor, x: torch.Tensor, copies: int) -> list[Call]:
    """As vLLM runs a layer of the dtype of ``weight`` and ``x`` on this CPU."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    layers: list[Any] = [torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False) for _ in range(copies)]
    for layer in layers:
        layer.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
        dispatch_cpu_unquantized_gemm(layer, remove_weight=False)
    return [partial(layer.cpu_linear, x, layer.weight, None) for layer in layers]


def quantized(weight: torch.Tensor, x: torch.Tensor, copies: int, name: str, scheme: LayerScheme) -> list[Call]:
    """Nothing where the implementation can not run here. Raises RuntimeError where it is wrong."""
    layer = round_layer(weight, replace(scheme, sparse=None))
    if isinstance(layer, DenseSparseWeight) and scheme.sparse:
        chosen_at = torch.rand(weight.shape, generator=torch.Generator().manual_seed(2)) < 0.005
        layer = replace(layer, scheme=scheme, sparse=SparsePart.from_mask(weight, chosen_at))
    dispatch: Any = w8a8 if scheme.activations else dense_sparse
    kind: Any = W8A8Config if scheme.activations else DenseSparseConfig
    chosen, config = dispatch.IMPLEMENTATIONS[name], kind.of(layer, DTYPE, CPU)
    able, reason = chosen.can_implement(config)
    if not able:
        print(f"{name}: {reason}", file=sys.stderr)
        return []
    prepared = [chosen.prepare(layer, config) for _ in range(copies)]
    calls: list[Call] = [
        partial(chosen.apply, x, list(one.tensors.values()), None, one.out_features, list(one.meta)) for one in prepared
    ]
    check(name, calls[0](), reference.linear(x, layer))
    return calls


def vllms_own(weight: torch.Tensor, x: torch.Tensor, copies: int) -> list[Call]:
    """vLLM's kernel for 4-bit weights of GPTQ, AWQ and compressed-tensors checkpoints, on the symmetric grid. Nothing
    where vLLM was built without it, as for processors without AVX-512."""
    if not hasattr(torch.ops._C, "cpu_gemm_wna16"):
        print(f"{VLLM}: its build for this processor has no cpu_gemm_wna16", file=sys.stderr)
        return []
    layer = round_layer(weight, LayerScheme(WeightScheme(4, 64, symmetric=True)))
    assert isinstance(layer, DenseSparseWeight)
    with vllm_ready(Setting(CPU, DTYPE)) as linear:
        calls: list[Call] = [partial(vllm_kernel(linear, "CPUWNA16", layer), x) for _ in range(copies)]
    check("vLLM", calls[0](), reference.linear(x, layer))
    return calls


def check(name: str, y: torch.Tensor, expected: torch.Tensor) -> None:
    """Raises RuntimeError unless they agree."""
    wrong = (y.float() - expected.float()).abs().max() / expected.abs().max()
    if wrong > 0.01:  # bfloat16 has a step of 0.004
        raise RuntimeError(f"{name}: differs from the reference by {wrong:.1%}")


def least_seconds(columns: dict[str, list[Call]], seconds: float) -> dict[str, float]:
    """Of one call: columns in turns, until each has run for ``seconds``; three times at least."""
    least, begun, rounds = dict.fromkeys(columns, float("inf")), time.monotonic(), 0
    while rounds < 3 or time.monotonic() - begun < seconds * len(columns):
        rounds += 1
        for name, calls in columns.items():
            start = time.process_time()
            for call in calls:
                call()
            least[name] = min(least[name], (time.process_time() - start) / len(calls))
    return least


def measure(shape: tuple[int, int], tokens: int, seconds: float, only: str) -> dict[str, float]:
    """Seconds of processor time by column; of the quantized ones those whose name has ``only`` in it."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DTYPE)
    x = torch.randn(tokens, shape[1], generator=torch.Generator().manual_seed(1)).to(DTYPE)
    copies = -(-CACHE_BYTES // weight.numel())
    columns = {"bfloat16": unquantized(weight, x, copies), "float32": unquantized(weight.float(), x.float(), copies)}
    if only in VLLM:
        columns[VLLM] = vllms_own(weight, x, copies)
    for name, kind in QUANTIZED:
        if only in (column := f"{kind}, {name}"):
            columns[column] = quantized(weight, x, copies, name, SCHEMES[kind])
    return least_seconds({column: calls for column, calls in columns.items() if calls}, seconds)


def sizes(text: str) -> list[tuple[int, int]]:
    return [(int(rows), int(columns)) for rows, columns in (one.split("x") for one in text.split(","))]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=sizes, default=SHAPES, metavar="NxK,…")
    parser.add_argument("--tokens", type=lambda text: [int(one) for one in text.split(",")], default="1,8,64,512")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1, help="for each cell")
    parser.add_argument("--only", default="", metavar="TEXT", help="quantized columns with it in their name")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    rows = []
    for shape in arguments.shapes:
        for tokens in arguments.tokens:
            found = measure(shape, tokens, arguments.seconds, arguments.only)
            base = found.pop("bfloat16")
            times = {one: f"{seconds * 1e6:.0f} ({base / seconds:.1f}x)" for one, seconds in found.items()}
            rows.append((f"{shape[0]} x {shape[1]}", str(tokens), f"{base * 1e6:.0f}", *times.values()))
            print(*rows[-1], sep=" | ", file=sys.stderr, flush=True)
    print(table(("rows x columns", "tokens", "bfloat16", *times), rows))


if __name__ == "__main__":
    main()
