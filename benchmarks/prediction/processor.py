"""The four schedulers of a multiprocessor, their units and ways to memory, and warps that share them.

A scheduler issues an instruction of the warp that it has issued last, else of the oldest one that can go on: whose
stall is over, whose scoreboards are free, and whose unit is. Memory is one queue for all, as are the L2, and the way to
the caches and to shared memory. Not modelled: register banks and the instruction cache, but that an instruction takes
longer on average; other processors' luck.
"""

import heapq
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import cycle, islice

from benchmarks.prediction.code import SCOREBOARDS, Instruction
from benchmarks.prediction.gpus import SCHEDULERS, Gpu

NEVER = math.inf
LINES_OF_A_GATHER = 16  # 128-byte lines that 32 lanes reach, about: each takes the L1 a cycle
QUEUE = 24  # cycles of work that the way to the caches holds
WGMMA_LEAST, WGMMA_LATENCY = 16, 30
BRANCH, BARRIER, REFILL = 8, 20, 30
GROUPS = 32  # of copies and of wgmma that are kept track of: more are never waited for

_CONTROL = (
    "NOP", "BRA", "EXIT", "BAR", "DEPBAR", "LDGDEPBAR", "WARPSYNC", "BSSY", "BSYNC", "ACQBULK", "PREEXIT", "WARPGROUP",
    "HGMMA", "ERRBAR", "CGAERRBAR", "MEMBAR", "CCTL",
)  # fmt: skip
_RESULTS = {  # cycles until a result is there, where that is not an access
    "REDUX": 22, "SHFL": 26, "S2R": 36, "S2UR": 36, "LDC": 36, "ULDC": 36, "MUFU": 20, "HMMA": 34, "IMMA": 34,
}  # fmt: skip


@dataclass(frozen=True)
class Access:
    """Where a warp's access goes, "memory", "l2", "l1" or "gather" (of x, from the L1), and how many bytes of it are
    not already there. ``OFF``: nowhere, since its predicate is false."""

    level: str
    bytes: int


OFF = Access("off", 0)


@dataclass
class Step:
    """An instruction as the model sees it."""

    one: Instruction
    unit: str
    busy: int
    latency: int
    lines: int
    access: Access | None
    allowed: int | None


@dataclass
class Program:
    warps: list["Warp"]
    waiting: int = 0
    left: int = 0


@dataclass(eq=False)
class Warp:
    trace: Sequence[int]
    program: Program
    ready: float
    due: float  # when it would go on if nothing but its own stalls held it
    at: int = 0
    boards: list[int] = field(default_factory=lambda: [0] * SCOREBOARDS)
    copies: list[float] = field(default_factory=list)  # when groups of copies to shared memory are done
    copied: float = 0.0  # when the last one of the next group is
    products: list[float] = field(default_factory=list)  # when groups of wgmma are
    stopped: bool = False


@cache
def _units(gpu: Gpu) -> dict[str, tuple[str, int]]:
    """Of instructions the unit, and the cycles in which it takes one of a warp; those that are not here are whole
    numbers', or begin with U and are the uniform unit's."""
    named = {
        ("", 0): _CONTROL,
        ("float", gpu.float32): ("FFMA", "FMUL", "FADD", "FFMA32I"),
        ("half", gpu.half2): ("HFMA2", "HADD2", "HMUL2"),
        ("multiply", 2): ("IMAD",),
        ("access", 2): ("LDG", "LDS", "STS", "STG", "LDSM", "STSM", "LDGSTS", "ATOMG", "ATOMS", "SHFL", "REDG"),
        ("matrix", gpu.mma): ("HMMA", "IMMA"),
        ("special", 8): ("REDUX", "MUFU"),
        ("uniform", 2): ("S2UR", "R2UR"),
    }
    return {name: unit for unit, names in named.items() for name in names}


def _step(one: Instruction, access: Access | None, gpu: Gpu) -> Step:
    unit, busy = _units(gpu).get(one.base, ("uniform" if one.base[0] == "U" else "integer", 2))
    latency = _RESULTS.get(one.base, 30)
    if one.base in ("LDS", "LDSM"):
        latency = gpu.to_shared + 6 * (one.bytes == 16 or one.base == "LDSM")
    lines = max(1, one.bytes // 4)
    if one.base == "LDSM":
        lines = int(one.name[-1])
    if access and access.level == "gather":
        lines = LINES_OF_A_GATHER
    allowed = re.search(r"(?:SB\d|gsb0), 0x([0-9a-f]+)", one.operands) if "DEPBAR" in one.name else None
    return Step(one, unit, busy, latency, lines, access, int(allowed[1], 16) if allowed else None)


class Processor:
    """Runs programs of so many warps, ``resident`` of them at a time. A trace has the place in ``code`` of what a warp
    issues; ``len(code)`` more where it is an access that is ``OFF``."""

    def __init__(
        self, code: list[Instruction], place: Callable[[Instruction], Access | None], gpu: Gpu, warps: int
    ) -> None:
        self._steps = [_step(one, place(one), gpu) for one in code] + [_step(one, OFF, gpu) for one in code]
        self._gpu, self._warps, self._instructions = gpu, warps, len(code)
        self._running: list[list[Warp]] = [[] for _ in range(SCHEDULERS)]
        self._last: list[Warp | None] = [None] * SCHEDULERS
        self._free: list[dict[str, float]] = [{} for _ in range(SCHEDULERS)]
        self._slot = [0.0] * SCHEDULERS  # until when a scheduler is busy with what it has issued
        self._matrix = [0.0] * SCHEDULERS
        self._caches = self._memory = self._l2 = 0.0
        self._events: list[tuple[float, int, Warp, int]] = []
        self._count = self._started = 0
        self.waits: Counter[int] = Counter()  # by instruction, the cycles that warps waited before it

    def run(self, traces: Sequence[Sequence[int]], programs: int, resident: int) -> float:
        """Cycles until the last of ``programs`` has ended, whose warps take one of ``traces`` in turn."""
        pending = islice(cycle(traces), programs)
        for trace in islice(pending, resident):
            self._start(trace, 0.0)
        now, ended = 0.0, 0
        while ended < programs:
            while self._events and self._events[0][0] <= now:
                _, _, warp, board = heapq.heappop(self._events)
                warp.boards[board] -= 1
            later, any_issued = NEVER, False
            for scheduler in range(SCHEDULERS):
                chosen, when = self._choose(scheduler, now)
                later = min(later, when)
                self._last[scheduler] = chosen
                if chosen:
                    any_issued = True
                    if self._issue(chosen, scheduler, now):
                        ended += 1
                        for trace in islice(pending, 1):
                            self._start(trace, now + REFILL)
            upcoming = self._events[0][0] if self._events else NEVER
            now = now + 1 if any_issued else max(now + 1, min(later, upcoming))
        return now

    def _start(self, trace: Sequence[int], now: float) -> None:
        program = Program([], left=self._warps)
        for _ in range(self._warps):
            begin = now + self._started * 3 % 17
            warp = Warp(trace, program, begin, begin)
            program.warps.append(warp)
            self._running[self._started % SCHEDULERS].append(warp)
            self._started += 1

    def _choose(self, scheduler: int, now: float) -> tuple[Warp | None, float]:
        """A warp that can issue, or when one may be able to."""
        if self._slot[scheduler] >= now + 1:
            return None, now + 1
        later, last = NEVER, self._last[scheduler]
        for warp in (last, *self._running[scheduler]) if last else self._running[scheduler]:
            if warp.stopped:
                continue
            if warp.ready > now:
                later = min(later, warp.ready)
                continue
            step = self._steps[warp.trace[warp.at]]
            if any(warp.boards[board] for board in step.one.waits):
                continue
            when = self._held(warp, step, scheduler, now)
            if when <= now:
                return warp, now
            later = min(later, when)
        return None, later

    def _held(self, warp: Warp, step: Step, scheduler: int, now: float) -> float:
        """Until when what the instruction needs is not there."""
        if step.allowed is not None:
            groups = sorted(warp.products if step.one.base == "WARPGROUP" else warp.copies)
            return groups[-1 - step.allowed] if len(groups) > step.allowed else now
        when = self._free[scheduler].get(step.unit, 0.0) if step.unit else now
        return max(when, self._caches - QUEUE) if step.unit == "access" else when

    def _issue(self, warp: Warp, scheduler: int, now: float) -> bool:
        """Whether a program has ended with it."""
        step = self._steps[warp.trace[warp.at]]
        one, base = step.one, step.one.base
        self.waits[warp.trace[warp.at] % self._instructions] += int(now - warp.due)
        self._slot[scheduler] = max(self._slot[scheduler], now) + self._gpu.issue
        warp.ready = warp.due = now + max(1, one.stall)
        done = now + step.latency
        if step.unit:
            self._free[scheduler][step.unit] = now + step.busy
        if step.unit == "access":
            done = self._reach(step, now)
        if base == "LDGSTS":
            warp.copied = max(warp.copied, done)
        elif base == "LDGDEPBAR":
            warp.copies = [*warp.copies[-GROUPS:], warp.copied]
        elif base == "HGMMA":
            size = int(re.findall(r"64x(\d+)x", one.name)[0])
            self._matrix[scheduler] = max(self._matrix[scheduler], now) + max(WGMMA_LEAST, size / 2)
            if "gsb0" in one.operands:
                warp.products = [*warp.products[-GROUPS:], self._matrix[scheduler] + WGMMA_LATENCY]
        elif base == "BRA":
            warp.ready = max(warp.ready, now + BRANCH)
        elif one.name.startswith("MEMBAR") and one.name.endswith("GPU"):
            warp.ready = now + self._gpu.fence
        if one.written is not None:
            self._later(math.ceil(done), warp, one.written)
        if one.read is not None:
            self._later(max(now + 10, math.ceil(self._caches) if step.unit == "access" else 0), warp, one.read)
        warp.at += 1
        if base == "BAR":
            self._meet(warp, now)
        return warp.at == len(warp.trace) and self._end(warp, scheduler)

    def _later(self, when: float, warp: Warp, board: int) -> None:
        warp.boards[board] += 1
        self._count += 1
        heapq.heappush(self._events, (when, self._count, warp, board))

    def _reach(self, step: Step, now: float) -> float:
        """When an access is done."""
        gpu, access = self._gpu, step.access
        if access == OFF:
            return now
        self._caches = max(self._caches, now) + step.lines
        if access is None:
            return self._caches + step.latency
        if access.level == "memory":
            self._memory = max(self._memory, now) + access.bytes / gpu.memory
            return max(self._caches, self._memory) + gpu.to_memory
        if access.level == "l2":
            self._l2 = max(self._l2, now) + access.bytes / gpu.l2
            return max(self._caches, self._l2) + gpu.to_l2
        return self._caches + gpu.to_l1

    def _meet(self, warp: Warp, now: float) -> None:
        program = warp.program
        program.waiting, warp.stopped = program.waiting + 1, True
        if program.waiting == self._warps:
            program.waiting = 0
            for one in program.warps:
                one.stopped, one.ready = False, max(one.ready, now + BARRIER)

    def _end(self, warp: Warp, scheduler: int) -> bool:
        self._running[scheduler].remove(warp)
        self._last[scheduler] = None
        warp.stopped = True
        warp.program.left -= 1
        return warp.program.left == 0
