"""Instructions that take registers and give one: arithmetic, comparisons, conversions, and mov."""

from collections.abc import Callable

import numpy as np

from tests.emulator import lanes
from tests.emulator.lanes import LANES, UNSIGNED, Array, typed, untyped
from tests.emulator.ptx import Instruction
from tests.emulator.registers import Registers, Warp

Step = Callable[[Warp], None]
# "approx" and "full" of a GPU are off by a bit or two of what is computed here
MODIFIERS = {"NaN", "rn", "rzi", "lo", "hi", "wide", "relu", "approx", "full", *lanes.COMPARISONS, *lanes.KINDS}


def size_of(kind: str) -> int:
    """Bytes; 0 of a predicate."""
    return 0 if kind == "pred" else np.dtype(lanes.KINDS[kind]).itemsize


def _select(kind: str) -> Callable[..., Array]:
    bits = f"b{8 * size_of(kind)}"
    return lambda a, b, which: np.where(which, typed(a, bits), typed(b, bits))


def _compare(how: str, kind: str) -> Callable[..., Array]:
    function = lanes.COMPARISONS[how]
    return lambda a, b: function(typed(a, kind), typed(b, kind))


def _at_least_zero(function: Callable[..., Array], kind: str) -> Callable[..., Array]:
    return lambda *raw: untyped(np.maximum(typed(function(*raw), kind), 0))


def _function(parts: tuple[str, ...]) -> Callable[..., Array]:
    """Raw registers -> raw register. Raises KeyError for what is not known."""
    name, *rest, kind = parts
    if not MODIFIERS.issuperset(rest):
        raise KeyError(parts)
    special: dict[str, Callable[[], Callable[..., Array]]] = {
        "cvt": lambda: lanes.convert(rest[-1], kind),
        "setp": lambda: _compare(rest[0], kind),
        "selp": lambda: _select(kind),
        "prmt": lambda: lanes.permute,
        "lop3": lambda: lanes.logic,
        "bfe": lambda: lanes.bit_field(kind),
        "popc": lambda: lambda a: np.bitwise_count(typed(a, kind)).astype(np.uint32),
    }
    if name in special:
        return special[name]()
    if "wide" in rest:
        return lanes.wide(name, kind)
    if "hi" in rest:
        return lanes.high(kind)
    function = lanes.arithmetic(name, kind, "NaN" in rest)
    return _at_least_zero(function, kind) if "relu" in rest else function


def _sizes(parts: tuple[str, ...], count: int) -> list[int]:
    """Bytes of each of ``count`` operands, as far as immediates can be some."""
    size = size_of(parts[-1])
    sizes = [size] * count
    if parts[0] == "selp":
        sizes[2] = 0
    elif parts[0] in ("shl", "shr", "bfe"):
        sizes[1:] = [4] * (count - 1)
    elif "wide" in parts:
        sizes[2:] = [2 * size] * (count - 2)
    return sizes


def pure(registers: Registers, instruction: Instruction) -> Step:
    try:
        function, sizes = _function(instruction.parts), _sizes(instruction.parts, len(instruction.operands) - 1)
    except KeyError:
        raise NotImplementedError(instruction.text) from None
    to, *of = instruction.operands
    slots = [registers.slot(operand, size) for operand, size in zip(of, sizes, strict=True)]
    target, active = registers.slot(to), registers.active(instruction)
    kind, guarded = registers.width(target), instruction.guard is not None

    def step(warp: Warp) -> None:
        value = function(*(warp.registers[slot] for slot in slots))
        if value.dtype != kind:
            value = value.astype(kind)
        if guarded:
            value = np.where(np.isin(LANES, active(warp)), value, warp.registers[target])
        warp.registers[target] = value

    return step


def move(registers: Registers, instruction: Instruction) -> Step:
    """mov, which also joins halves to a register and takes it apart."""
    to, of = instruction.operands
    size = size_of(instruction.parts[1])
    if isinstance(of, tuple):
        slots, target = registers.vector(of, size // len(of)), registers.slot(to)

        def join(warp: Warp) -> None:
            pieces = [typed(warp.registers[slot], f"b{8 * size // len(slots)}") for slot in slots]
            warp.registers[target] = np.stack(pieces, axis=1).view(UNSIGNED[size])[:, 0]

        return join
    if isinstance(to, tuple):
        targets, source = registers.vector(to), registers.slot(of, size)

        def split(warp: Warp) -> None:
            pieces = warp.registers[source].view(UNSIGNED[size // len(targets)]).reshape(32, len(targets))
            for target, piece in zip(targets, np.ascontiguousarray(pieces.T), strict=True):
                warp.registers[target] = piece

        return split
    return pure(registers, instruction)
