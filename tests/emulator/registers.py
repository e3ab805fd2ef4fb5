"""The registers of a kernel by number, and a warp's values of them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from tests.emulator.lanes import LANES, UNSIGNED, Array
from tests.emulator.memory import Actor, Global, Shared
from tests.emulator.ptx import Address, Instruction, Kernel, Operand

WIDTHS = {"%p": 0, "%rs": 2, "%h": 2, "%r": 4, "%f": 4, "%rd": 8, "%fd": 8}  # bytes; 0: a predicate
JUNK = 0x7FDEADDEADDEADDE  # in registers that nothing has been written to
SHARED = "global_smem"  # the symbol of a program's shared memory, which begins at 0


@dataclass
class Product:
    """A wgmma under way: ``operands`` reads what it has in shared memory, ``seen`` is what that was at its start."""

    results: dict[int, Array]
    operands: Callable[[], list[Array]]
    seen: list[Array]


@dataclass
class Warp(Actor):
    """32 lanes. ``copies`` and ``products``: groups under way, the open one last."""

    registers: list[Array]
    memory: Global
    shared: Shared
    copies: list[list[Callable[[], None]]] = field(default_factory=lambda: [[]])
    products: list[list[Product]] = field(default_factory=lambda: [[]])

    def pending(self, slot: int) -> Array:
        """The register as the last product under way will leave it."""
        under_way = (product for group in reversed(self.products) for product in reversed(group))
        return next((p.results[slot] for p in under_way if slot in p.results), self.registers[slot])


Item = TypeVar("Item")


def waited_for(groups: list[list[Item]], allowed: int) -> Iterator[Item]:
    """What is in all but the last ``allowed`` groups, and the open one; they are not under way any more."""
    while len(groups) - 1 > allowed:
        yield from groups.pop(0)


class Registers:
    """Hands out slots: to registers, special registers and parameters by name, to immediates by value."""

    def __init__(self, kernel: Kernel):
        self._initial: list[Array] = []
        self._slots: dict[str, int] = {}
        self._constants: dict[tuple[int, int], int] = {}
        self._parameters = kernel.parameters
        self._declared = {name: 0 if kind == "pred" else int(kind[1:]) // 8 for name, kind in kernel.declared.items()}

    def _new(self, values: Array) -> int:
        self._initial.append(values)
        return len(self._initial) - 1

    def slot(self, operand: Operand, size: int = 4) -> int:
        """``size`` in bytes (0: a predicate) of an immediate; names say it themselves."""
        if operand == SHARED:
            operand = 0
        if isinstance(operand, int):
            if (operand, size) not in self._constants:
                value = operand % 256**size if size else bool(operand)
                self._constants[operand, size] = self._new(np.full(32, value, dtype=UNSIGNED.get(size, np.bool_)))
            return self._constants[operand, size]
        if not isinstance(operand, str):
            raise NotImplementedError(f"operand {operand}")
        if operand == "_":
            return self._new(np.zeros(32, dtype=np.uint64))
        if operand not in self._slots:
            width = 8 if operand in self._parameters else WIDTHS.get(operand.rstrip("0123456789"), 4)
            width = self._declared.get(operand, width)
            value = JUNK % 256**width if width else True
            self._slots[operand] = self._new(np.full(32, value, dtype=UNSIGNED.get(width, np.bool_)))
        return self._slots[operand]

    def vector(self, operand: Operand, size: int = 4) -> list[int]:
        return [self.slot(part, size) for part in (operand if isinstance(operand, tuple) else (operand,))]

    def address(self, operand: Operand) -> Callable[[Warp], Array]:
        assert isinstance(operand, Address)
        base, offset = self.slot(operand.base), operand.offset
        return lambda warp: warp.registers[base] + warp.registers[base].dtype.type(offset)

    def active(self, instruction: Instruction) -> Callable[[Warp], Array]:
        """The lanes for which the instruction's guard holds."""
        if instruction.guard is None:
            return lambda warp: LANES
        slot, wanted = self.slot(instruction.guard[0]), instruction.guard[1]
        return lambda warp: np.flatnonzero(warp.registers[slot] == wanted)

    def width(self, slot: int) -> np.dtype:
        return self._initial[slot].dtype

    def filled(self, values: dict[str, int], warp: int) -> list[Array]:
        """At the start of a warp; ``values`` of special registers, variables and parameters."""
        registers = list(self._initial)
        for name in values.keys() & self._slots.keys():
            kind = self.width(self._slots[name])
            registers[self._slots[name]] = np.full(32, values[name] % 256**kind.itemsize, dtype=kind)
        for name, first in (("%tid.x", 32 * warp), ("%laneid", 0)):
            if name in self._slots:
                registers[self._slots[name]] = (LANES + first).astype(np.uint32)
        return registers
