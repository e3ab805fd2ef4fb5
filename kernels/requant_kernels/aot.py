"""``make aot``: compiles kernels to machine code for GPUs that this machine does not have, and judges the result.

A variant that spills registers, does not fit into shared memory, or lacks the matrix instruction it is meant to use
fails the run. Nothing here is measured on a GPU: the table says what the compiler made of each configuration.

    python -m requant_kernels.aot                a cover of tiles, bits, kinds and dtypes (CI)
    python -m requant_kernels.aot --all          every combination that serving can reach (hours)
    python -m requant_kernels.aot --only middle --target 90 --json report.json
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from requant_kernels.gpu import FP_FUSION

SOURCES = ("requant_kernels.dense_sparse.triton.variants", "requant_kernels.w8a8.triton.variants")
NVIDIA = ("80", "89", "90", "100")
AMD = ("gfx942",)
SHARED_MEMORY = {"80": 166912, "89": 101376, "90": 232448, "100": 232448, "gfx942": 65536}  # bytes a program
MATRIX = {  # instruction -> how machine code shows it
    "mma": r"\b[HI]MMA\.",
    "wgmma": r"\b[HI]GMMA\.",
    "tcgen05": r"\bUTC[HIO]MMA",
    "mfma": r"\bv_mfma_",
}


@dataclass(frozen=True)
class Variant:
    """One compilation. ``signature``: argument -> triton type; ``constants``: constexpr -> value, or a function of the
    target; ``aligned``: integer arguments that are multiples of 16; ``targets``: target -> matrix instruction expected
    there ("" for none)."""

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...]
    warps: int
    stages: int
    targets: dict[str, str]


@dataclass(frozen=True)
class Report:
    """What became of a variant on a target: ``shared`` in bytes, ``spill`` counts spilling instructions (NVIDIA) or
    registers (AMD), ``loop`` the instructions of the longest loop and ``barriers`` those among them at which warps wait
    for each other (NVIDIA), ``failure`` is empty where all is well."""

    name: str
    target: str
    registers: int = 0
    spill: int = 0
    loop: int = 0
    barriers: int = 0
    shared: int = 0
    matrix: str = ""
    seconds: float = 0.0
    failure: str = ""


def _source(variant: Variant, target: str) -> Any:
    """The variant as triton's compiler takes it."""
    from triton.compiler import ASTSource

    names = variant.kernel.arg_names
    signature = {name: variant.signature.get(name, "constexpr") for name in names}
    aligned = [name for name in names if signature[name].startswith("*") or name in variant.aligned]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    constants = {name: value(target) if callable(value) else value for name, value in variant.constants.items()}
    return ASTSource(variant.kernel, signature, constexprs=constants, attrs=attributes)


def dump(kernel: Any, name: str, *options: str) -> str:
    """What a tool of Triton's wheel prints of a kernel's machine code for NVIDIA."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernel.cubin")
        binary.write_bytes(kernel.asm["cubin"])
        return subprocess.run([tool, *options, binary], capture_output=True, text=True, check=True).stdout


def registers_of(kernel: Any) -> int:
    found = re.search(r"REG:(\d+)", dump(kernel, "cuobjdump", "-res-usage"))
    assert found, "cuobjdump of triton's wheel reports otherwise than expected"
    return int(found[1])


def shared_of(kernel: Any) -> int:
    """Bytes of shared memory, Triton's and those that a kernel declares itself (patch.py)."""
    declared = re.findall(r"\.shared[^;]*\[(\d+)\];", kernel.asm.get("ptx", ""))
    return kernel.metadata.shared + sum(map(int, declared))


def _nvidia(kernel: Any) -> tuple[int, int, str]:
    """(registers, instructions that spill to local memory, machine code)."""
    code = dump(kernel, "cuobjdump", "-sass")
    return registers_of(kernel), len(re.findall(r"\b(?:LDL|STL)\b", code)), code


def _amd(kernel: Any) -> tuple[int, int, str]:
    code: str = kernel.asm["amdgcn"]
    found = {key: re.search(rf"\.{key}:\s+(\d+)", code) for key in ("vgpr_count", "vgpr_spill_count")}
    registers, spills = (int(match[1]) if match else 0 for match in found.values())
    return registers, spills, code


def compiled(variant: Variant, target: str) -> Any:
    """Triton's kernel; raises what its compiler does."""
    import triton
    from triton.backends.compiler import GPUTarget

    gpu = GPUTarget("cuda", int(target), 32) if target in NVIDIA else GPUTarget("hip", target, 64)
    options = {"num_warps": variant.warps, "num_stages": variant.stages, **FP_FUSION}
    return triton.compile(_source(variant, target), target=gpu, options=options)


def compile_variant(variant: Variant, target: str) -> Report:
    """Compiles and judges; a compiler's error becomes the report's failure."""
    begun = time.monotonic()
    try:
        kernel = compiled(variant, target)
    except Exception as error:  # whatever the compiler raises is this variant's result
        last = [line for line in str(error).splitlines() if line.strip()][-1:]
        return Report(variant.name, target, failure=f"does not compile: {type(error).__name__} {' '.join(last)[:160]}")
    registers, spill, code = _nvidia(kernel) if target in NVIDIA else _amd(kernel)
    found = next((name for name, pattern in reversed(MATRIX.items()) if re.search(pattern, code)), "")
    shared, wanted = shared_of(kernel), variant.targets[target]
    failure = ""
    if spill:
        failure = f"spills registers ({spill} times)"
    elif shared > SHARED_MEMORY[target]:
        failure = f"needs {shared} bytes of shared memory, {SHARED_MEMORY[target]} are there"
    elif wanted and found != wanted:
        failure = f"uses {found or 'no matrix instruction'} instead of {wanted}"
    loop = longest_loop(code) if target in NVIDIA else []
    barriers = sum(operation.startswith("BAR.SYNC") for operation in loop)
    seconds = time.monotonic() - begun
    return Report(variant.name, target, registers, spill, len(loop), barriers, shared, found, seconds, failure)


def longest_loop(code: str) -> list[str]:
    """Operations between the target of a backward branch and the branch, in the disassembly of cuobjdump; of loops with
    products, where there are any."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", code)
    at = {int(address, 16): index for index, (address, _, _) in enumerate(found)}
    longest = (False, 0, 0)
    for end, (_, operation, operands) in enumerate(found, 1):
        target = re.search(r"0x([0-9a-f]+)", operands)
        if operation.startswith("BRA") and target:
            begin = at.get(int(target[1], 16), end)  # what lies ahead is no loop
            multiplies = any("MMA" in operation for _, operation, _ in found[begin:end])
            longest = max(longest, (multiplies, end - begin, begin))
    _, length, begin = longest
    return [operation for _, operation, _ in found[begin : begin + length]]


@cache
def variants(everything: bool) -> tuple[Variant, ...]:
    return tuple(variant for name in SOURCES for variant in import_module(name).variants(everything))


def _job(job: tuple[bool, int, str]) -> Report:
    everything, index, target = job
    return compile_variant(variants(everything)[index], target)


def _jobs(everything: bool, only: str, targets: tuple[str, ...]) -> Iterator[tuple[bool, int, str]]:
    for index, variant in enumerate(variants(everything)):
        if only in variant.name:
            yield from ((everything, index, target) for target in variant.targets if target in targets)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every combination instead of a cover")
    parser.add_argument("--only", default="", help="variants whose name contains this")
    parser.add_argument("--target", action="append", choices=NVIDIA + AMD, help="may be repeated; default: all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path, help="write the reports there")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET is set: the interpreter compiles nothing")
    jobs = list(_jobs(arguments.all, arguments.only, tuple(arguments.target or NVIDIA + AMD)))
    print(
        f"{'target':>7} {'regs':>5} {'spill':>5} {'loop':>5} {'bars':>4} {'shared':>7} {'matrix':>8} {'s':>5}  variant"
    )
    reports = []
    with get_context("spawn").Pool(arguments.jobs) as pool:
        for report in pool.imap(_job, jobs):
            reports.append(report)
            print(
                f"{report.target:>7} {report.registers:>5} {report.spill:>5} {report.loop:>5} {report.barriers:>4} "
                f"{report.shared:>7} {report.matrix or '-':>8} {report.seconds:>5.1f}  {report.name}"
                + (f"   FAILED: {report.failure}" if report.failure else ""),
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(report) for report in reports], indent=1) + "\n")
    failed = sum(bool(report.failure) for report in reports)
    print(f"{len(reports)} compiled (no GPU involved), {failed} failed")
    return 1 if failed or not reports else 0


if __name__ == "__main__":
    sys.exit(main())
