"""Runs what the compiler made of a kernel, its PTX, on numpy: warp after warp, from barrier to barrier.

Programs start as on a GPU, in the order of the grid, a few at the same time.

Every instruction becomes a function of a warp. What no kernel of ours has used so far raises NotImplementedError.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from random import Random

import numpy as np

from tests.emulator import products, pure, transfers
from tests.emulator.memory import Fault, Global, Program, Shared, Told
from tests.emulator.ptx import Instruction, Kernel
from tests.emulator.registers import Registers, Warp

BUILDERS: dict[str, Callable[[Registers, Instruction], pure.Step]] = {
    "mov": pure.move,
    "ld.param": transfers.parameter,
    "ld.global.gpu.acquire": transfers.atomic,
    "ld": transfers.load,
    "st": transfers.store,
    "atom": transfers.atomic,
    "red": transfers.atomic,
    "cp.async.commit_group": transfers.commit_copies,
    "cp.async.wait_group": transfers.wait_for_copies,
    "cp.async": transfers.copy,
    "ldmatrix": transfers.load_matrix,
    "stmatrix": transfers.store_matrix,
    "shfl.sync": transfers.shuffle,
    "redux.sync": transfers.reduce,
    "griddepcontrol.wait": transfers.wait_for_launch,
    "griddepcontrol.launch_dependents": transfers.nothing,
    "bar.warp.sync": transfers.meet,
    "fence": transfers.nothing,
    "prefetch": transfers.nothing,
    "mma.sync": products.multiply,
    "wgmma.fence": transfers.nothing,
    "wgmma.mma_async": products.multiply_group,
    "wgmma.commit_group": products.commit_products,
    "wgmma.wait_group": products.wait_for_products,
}
"""By how an opcode begins, the longer first; all others are ``pure``."""


RESIDENT = 16  # programs that run at the same time


@dataclass(frozen=True)
class Launch:
    """``arguments``: the parameters as integers. ``pdl``: it begins before the launch before it has ended.
    ``order``: seed of the order in which programs that run at the same time, and warps, take turns."""

    arguments: list[int]
    grid: tuple[int, int, int]
    warps: int
    shared: int
    pdl: bool
    order: int


class Code:
    """A kernel made ready."""

    def __init__(self, kernel: Kernel):
        self.kernel = kernel
        self._registers = Registers(kernel)
        self._steps: list[Callable[[Warp], int | None]] = []
        self._stops: list[bool] = []  # a branch, a barrier or a return, which say where it goes on
        for at, instruction in enumerate(kernel.instructions):
            control = self._control(instruction, at)
            self._stops.append(control is not None)
            self._steps.append(control or self._build(instruction))

    def _build(self, instruction: Instruction) -> Callable[[Warp], None]:
        name = ".".join(instruction.parts)
        build = next((BUILDERS[prefix] for prefix in BUILDERS if f"{name}.".startswith(f"{prefix}.")), pure.pure)
        return build(self._registers, instruction)

    def _control(self, instruction: Instruction, at: int) -> Callable[[Warp], int | None] | None:
        name = instruction.parts[0]
        if name == "ret" and not instruction.guard:
            return lambda warp: None
        if name == "bar" and instruction.parts[1] == "sync" and instruction.operands == (0,):
            return lambda warp: at + 1
        if name != "bra":
            return None
        target, active = self.kernel.labels[str(instruction.operands[0])], self._registers.active(instruction)

        def branch(warp: Warp) -> int:
            lanes = len(active(warp))
            if lanes not in (0, 32):
                raise NotImplementedError(f"the lanes of a warp go different ways: {instruction.text}")
            return target if lanes else at + 1

        return branch

    def run(self, launch: Launch, memory: Global) -> None:
        values = dict(zip(self.kernel.parameters, launch.arguments, strict=True))
        values |= {f"%nctaid.{axis}": count for axis, count in zip("xyz", launch.grid, strict=True)}
        own = size = -(-launch.shared // 1024) * 1024
        for name, declared in self.kernel.shared.items():
            values[name] = size
            size += declared
        x, y, z = map(range, launch.grid)
        places = [(i, j, k) for k, j, i in product(z, y, x)]
        random, told = Random(launch.order), Told(np.zeros(len(places), dtype=np.int64))
        pending, running = list(enumerate(places))[::-1], list[tuple[Program, list[Iterator[bool]]]]()
        while pending or running:
            while pending and len(running) < RESIDENT:
                number, place = pending.pop()
                program = Program(place, number, told)
                shared = Shared(size, size - own, memory.traffic)
                here = values | {f"%ctaid.{axis}": index for axis, index in zip("xyz", place, strict=True)}
                warps = [
                    self._until_end(
                        Warp(program, index, not launch.pdl, self._registers.filled(here, index), memory, shared)
                    )
                    for index in range(launch.warps)
                ]
                running.append((program, warps))
            ready = [one for one in running if not one[0].waits]
            if not ready:
                raise Fault(f"{self.kernel.name}: all programs that run wait for others")
            program, warps = one = random.choice(ready)
            random.shuffle(warps)
            warps[:] = [warp for warp in warps if next(warp, False)]
            program.epoch += 1
            if not warps:
                running.remove(one)

    def _until_end(self, warp: Warp) -> Iterator[bool]:
        """Yields at every barrier."""
        at: int | None = 0
        with np.errstate(all="ignore"):
            while at is not None:
                at = self._until_stop(warp, at)
                if at is not None and self.kernel.instructions[at - 1].parts[0] == "bar":
                    warp.synced += 1
                    yield True

    def _until_stop(self, warp: Warp, at: int) -> int | None:
        """Runs up to the next stop, and that; where it goes on, None behind the end."""
        steps, stops, traffic = self._steps, self._stops, warp.memory.traffic
        try:
            while not stops[at]:
                if traffic:
                    traffic.begin(self.kernel.name, self.kernel.instructions[at])
                steps[at](warp)
                at += 1
            return steps[at](warp)
        except Fault as fault:
            instruction = self.kernel.instructions[at]
            raise Fault(
                f"{self.kernel.name}, program {warp.program.at}, warp {warp.index}, {instruction.source} "
                f"({instruction.text}): {fault}"
            ) from None
