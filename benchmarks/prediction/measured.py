"""Launches that were timed on an H200, with the machine code that ran: what the model is fitted to, and tested by."""

import json
import lzma
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.prediction.code import Instruction
from benchmarks.prediction.gpus import Gpu
from benchmarks.prediction.launches import Compiled, Run, in_turn, paths, run
from benchmarks.prediction.processor import Access

FILE = Path(__file__).parents[1] / "results/machine-code-H200.json.xz"


@dataclass(frozen=True)
class Launch:
    """A layer with ``density`` of its weights as entries; ``micros``: what it took."""

    tokens: int
    scheme: str
    density: float
    layer: str
    kernel: str
    iterations: int
    splits: int
    programs: int
    micros: float


@cache
def _read() -> tuple[dict[str, Compiled], tuple[Launch, ...]]:
    """The kernels' loads and stores are told apart already: an instruction's ``function`` is where it goes."""
    found = json.loads(lzma.decompress(FILE.read_bytes()))
    kernels = {
        name: Compiled([_instruction(one) for one in kernel.pop("code")], **kernel)
        for name, kernel in found["kernels"].items()
    }
    return kernels, tuple(Launch(**launch) for launch in found["launches"])


def _instruction(fields: list[Any]) -> Instruction:
    name, operands, predicate, stall, written, read, waits, access, target = fields
    return Instruction(name, operands, predicate, stall, written, read, tuple(waits), access, "", target)


def _access(one: Instruction) -> Access | None:
    level, _, size = one.function.partition(" ")
    return Access(level, int(size)) if level else None


def launches() -> tuple[Launch, ...]:
    return _read()[1]


def predicted(launch: Launch, gpu: Gpu) -> Run:
    one = _read()[0][launch.kernel]
    ways = paths(one.code, launch.iterations, launch.splits)
    return run(one, _access, gpu, in_turn(gpu, ways, launch.programs))


def blocks(found: Iterable[Launch]) -> dict[tuple[int, str, float], list[Launch]]:
    """By tokens, scheme and density, the layers of a block."""
    together = defaultdict(list)
    for launch in found:
        together[launch.tokens, launch.scheme, launch.density].append(launch)
    return together
