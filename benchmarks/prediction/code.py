"""Machine code of NVIDIA's GPUs, sm_80 to sm_90, with the control bits that its schedulers go by.

Where the bits stand is not documented; it is what others found (Jia et al., arXiv 1804.06826, for Volta's encoding,
which these GPUs share), and what disassembled kernels bear out.
"""

import ast
import re
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path

SCOREBOARDS = 6
_LINE = re.compile(r'//## File "([^"]*)", line (\d+)')
_LABEL = re.compile(r"^(\.L_\w+):")
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)([^;]*);\s+/\* 0x[0-9a-f]{16} \*/")
_CONTROL = re.compile(r"^\s+/\* 0x([0-9a-f]{16}) \*/")


@dataclass(frozen=True)
class Instruction:
    """``stall``: cycles before the warp's next one; ``written`` and ``read``: the scoreboards that it gives back when
    its result is there, and when its operands have been read; ``waits``: those that must be free before; ``function``
    and ``line``: where in Triton's source it comes from; ``target``: where a branch goes, an index."""

    name: str
    operands: str
    predicate: str
    stall: int
    written: int | None
    read: int | None
    waits: tuple[int, ...]
    function: str
    line: str
    target: int | None = None

    @property
    def base(self) -> str:
        return self.name.split(".", 1)[0]

    @property
    def bytes(self) -> int:
        """Of a lane, where it accesses memory."""
        sizes = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
        return next((sizes[part] for part in self.name.split(".")[1:] if part in sizes), 4)


def _source(path: str) -> Path:
    """Where that file is now: Triton's cache knows a kernel by its text, so that its machine code may name a checkout
    that held the same one and is gone."""
    parts = Path(path).parts
    package = next(one for one in ("requant_kernels", "triton") if one in parts)
    spec = find_spec(package)
    assert spec
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0], *parts[len(parts) - parts[::-1].index(package) :])


@cache
def _functions(path: str) -> list[tuple[int, str]]:
    tree = ast.parse(_source(path).read_text())
    return sorted((node.lineno, node.name) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def _function(path: str, line: int) -> str:
    """The last that begins before: lines of inline assembler are counted on from where it stands."""
    return next((name for first, name in reversed(_functions(path)) if first <= line), "")


def _scoreboard(bits: int) -> int | None:
    return bits if bits < SCOREBOARDS else None


def parse(text: str) -> list[Instruction]:
    """What nvdisasm prints of a kernel with -g, -hex and -c."""
    place, labels, pending = ("", ""), dict[str, int](), None
    found: list[Instruction] = []
    for line in text.splitlines():
        if match := _LINE.search(line):
            place = _function(match[1], int(match[2])), f"{Path(match[1]).name}:{match[2]}"
        elif match := _LABEL.match(line):
            labels[match[1]] = len(found)
        elif match := _INSTRUCTION.search(line):
            pending = match
        elif pending and (match := _CONTROL.match(line)):
            bits = int(match[1], 16) >> 41
            waits = tuple(i for i in range(SCOREBOARDS) if bits >> 11 + i & 1)
            boards = _scoreboard(bits >> 5 & 7), _scoreboard(bits >> 8 & 7)
            found.append(
                Instruction(pending[3], pending[4].strip(), pending[2] or "", bits & 15, *boards, waits, *place)
            )
            pending = None
    return [_resolved(one, labels) for one in found]


def _resolved(one: Instruction, labels: dict[str, int]) -> Instruction:
    label = re.search(r"\((\.L_\w+)\)", one.operands)
    if one.base != "BRA" or not label:
        return one
    return replace(one, target=labels[label[1]])


def loops_of(code: list[Instruction]) -> list[range]:
    """From the target of a backward branch to the branch."""
    return [range(one.target, end) for end, one in enumerate(code, 1) if one.target is not None and one.target < end]


def longest_loop(code: list[Instruction]) -> range:
    """Of those with products, where there are any."""
    loops = loops_of(code)
    multiply = [loop for loop in loops if any("MMA" in code[at].name for at in loop)]
    return max(multiply or loops, key=len, default=range(0))


def path(code: list[Instruction], begin: int, end: int) -> list[int]:
    """The instructions that a warp goes through from ``begin`` to ``end``: what is in a loop but the longest is skipped
    where that is a choice, unless it stores, else gone through once."""
    main, loops = longest_loop(code), loops_of(code)
    needed = [loop for loop in loops if loop == main or any(code[i].base == "STG" for i in loop)]

    def skips(at: int, ahead: int, some: list[range]) -> bool:
        return any(at < loop.start and loop.stop <= ahead for loop in some)

    found, at = list[int](), begin
    while at < end:
        found.append(at)
        one = code[at]
        ahead = one.target if one.target is not None and one.target > at else None
        if one.base == "EXIT" and not one.predicate:
            break
        if ahead and (not one.predicate or (skips(at, ahead, loops) and not skips(at, ahead, needed))):
            at = ahead
        else:
            at += 1
    return found
