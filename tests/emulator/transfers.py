"""Instructions between registers and memory, and among the lanes of a warp.

Copies to shared memory (cp.async) are announced when they begin and land when they are waited for.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.emulator import matrix
from tests.emulator.lanes import LANES, Array, typed, untyped
from tests.emulator.memory import Memory
from tests.emulator.ptx import Address, Instruction
from tests.emulator.pure import Step, size_of
from tests.emulator.registers import Registers, Warp, waited_for


def _place(instruction: Instruction) -> Callable[[Warp, Array, int, int], tuple[Memory, Array]]:
    """The memory that an instruction means, and items of it."""
    if instruction.parts[1].startswith("shared"):
        return lambda warp, at, size, count: (warp.shared, warp.shared.locate(at, size, count))
    return lambda warp, at, size, count: warp.memory.locate(at, size, count)


def parameter(registers: Registers, instruction: Instruction) -> Step:
    """ld.param."""
    to, of = instruction.operands
    assert isinstance(of, Address)
    target, source = registers.slot(to), registers.slot(of.base)
    kind = registers.width(target)

    def step(warp: Warp) -> None:
        warp.registers[target] = warp.registers[source].astype(kind)

    return step


def load(registers: Registers, instruction: Instruction) -> Step:
    size, place = size_of(instruction.parts[-1]), _place(instruction)
    to, of = instruction.operands
    targets, address, active = registers.vector(to), registers.address(of), registers.active(instruction)

    def step(warp: Warp) -> None:
        lanes = active(warp)
        if not len(lanes):
            return
        warp.lanes = lanes
        memory, items = place(warp, address(warp)[lanes], size, len(targets))
        for target, values in zip(targets, memory.read(items, size, warp).T, strict=True):
            register = warp.registers[target].copy()
            register[lanes] = values
            warp.registers[target] = register

    return step


def store(registers: Registers, instruction: Instruction) -> Step:
    size, place = size_of(instruction.parts[-1]), _place(instruction)
    to, of = instruction.operands
    sources, address, active = registers.vector(of, size), registers.address(to), registers.active(instruction)

    def step(warp: Warp) -> None:
        lanes = active(warp)
        if not len(lanes):
            return
        values = np.stack([typed(warp.registers[slot], f"b{8 * size}")[lanes] for slot in sources], axis=1)
        warp.lanes = lanes
        memory, items = place(warp, address(warp)[lanes], size, len(sources))
        memory.write(items, size, values, warp)

    return step


def atomic(registers: Registers, instruction: Instruction) -> Step:
    """atom and red, of 32 bits in global memory for the whole GPU: add, and inc, which goes to zero from its operand
    on; and a load that acquires."""
    name, *parts = instruction.parts
    [order] = {"acq_rel", "acquire", "release", "relaxed"} & set(parts) or {""}
    [operation] = {"add", "inc"} & set(parts) or {""}
    kind = {"b32"} if name == "ld" else {operation, "u32"}
    if set(parts) != {"global", "gpu", order} | kind:
        raise NotImplementedError(instruction.text)
    operands = [*instruction.operands, 0] if name == "ld" else instruction.operands
    *to, of, by = operands
    second, address, active = registers.slot(by), registers.address(of), registers.active(instruction)
    [target] = registers.vector(to[0] if to else "_")

    def step(warp: Warp) -> None:
        register = warp.registers[target].copy()
        for lane in active(warp):
            memory, items = warp.memory.locate(address(warp)[lane : lane + 1], 4, 1)
            operand = int(warp.registers[second][lane])

            def then(before: int, operand: int = operand) -> int:
                if operation == "inc":
                    return before + 1 if before < operand else 0
                return before + operand

            register[lane] = memory.count(items[0, 0], then, warp, order)
        warp.registers[target] = register

    return step


def copy(registers: Registers, instruction: Instruction) -> Step:
    """cp.async of 4, 8 or 16 bytes, or of none, which become zeros."""
    to, of, count, *length = instruction.operands
    assert isinstance(count, int)
    target, source, active = registers.address(to), registers.address(of), registers.active(instruction)
    valid = registers.slot(length[0] if length else count)
    words = count // 4

    def step(warp: Warp) -> None:
        lanes = active(warp)
        if not len(lanes):
            return
        lengths = warp.registers[valid][lanes]
        full = lengths == count
        if not (full | (lengths == 0)).all():
            raise NotImplementedError(f"a copy of some of its bytes: {instruction.text}")
        values = np.zeros((len(lanes), words), dtype=np.uint32)
        if full.any():
            memory, items = warp.memory.locate(source(warp)[lanes][full], 4, words)
            values[full] = memory.read(items, 4, warp)
        there = warp.shared.locate(target(warp)[lanes], 4, words)
        warp.shared.announce(there, 4, warp)
        warp.copies[-1].append(lambda: warp.shared.write(there, 4, values, warp))

    return step


def commit_copies(registers: Registers, instruction: Instruction) -> Step:
    return lambda warp: warp.copies.append([])


def wait_for_copies(registers: Registers, instruction: Instruction) -> Step:
    allowed = instruction.operands[0]
    assert isinstance(allowed, int)

    def step(warp: Warp) -> None:
        for land in waited_for(warp.copies, allowed):
            land()

    return step


def load_matrix(registers: Registers, instruction: Instruction) -> Step:
    to, of = instruction.operands
    targets, address = registers.vector(to), registers.address(of)
    transposed = "trans" in instruction.parts

    def step(warp: Warp) -> None:
        rows = warp.shared.locate(address(warp)[: 8 * len(targets)], 2, 8)
        matrices = warp.shared.read(rows, 2, warp).reshape(len(targets), 8, 8)
        for target, register in zip(targets, matrix.spread(matrices, transposed), strict=True):
            warp.registers[target] = register

    return step


def store_matrix(registers: Registers, instruction: Instruction) -> Step:
    to, of = instruction.operands
    sources, address = registers.vector(of), registers.address(to)
    transposed = "trans" in instruction.parts

    def step(warp: Warp) -> None:
        rows = warp.shared.locate(address(warp)[: 8 * len(sources)], 2, 8)
        values = matrix.gathered([warp.registers[slot] for slot in sources], transposed)
        warp.shared.write(rows, 2, values.reshape(-1, 8), warp)

    return step


def shuffle(registers: Registers, instruction: Instruction) -> Step:
    """shfl.sync.bfly, .idx and .up among all lanes; what would come up from below the first stays as it was."""
    mode = instruction.parts[2]
    to, of, by, clamp, members = instruction.operands
    if {"bfly": 31, "idx": 31, "up": 0}.get(mode) != clamp or members != -1:
        raise NotImplementedError(instruction.text)
    target, source, lane = registers.slot(to), registers.slot(of), registers.slot(by)

    def step(warp: Warp) -> None:
        at = warp.registers[lane].astype(np.int64) % 32
        if mode == "bfly":
            at = LANES ^ at
        elif mode == "up":
            at = np.where(at <= LANES, LANES - at, LANES)
        warp.registers[target] = warp.registers[source][at]

    return step


def reduce(registers: Registers, instruction: Instruction) -> Step:
    """redux.sync over all lanes."""
    ways: dict[str, Any] = {"min": np.min, "max": np.max, "add": np.sum}
    choose, kind = ways[instruction.parts[2]], instruction.parts[3]
    target, source = registers.slot(instruction.operands[0]), registers.slot(instruction.operands[1])

    def step(warp: Warp) -> None:
        values = typed(warp.registers[source], kind)
        warp.registers[target] = untyped(np.full(32, choose(values).astype(values.dtype)))

    return step


def wait_for_launch(registers: Registers, instruction: Instruction) -> Step:
    """griddepcontrol.wait."""

    def step(warp: Warp) -> None:
        warp.waited = True

    return step


def meet(registers: Registers, instruction: Instruction) -> Step:
    """bar.warp.sync of all lanes, which never go apart here."""

    def step(warp: Warp) -> None:
        warp.synced += 1

    return step


def nothing(registers: Registers, instruction: Instruction) -> Step:
    return lambda warp: None
