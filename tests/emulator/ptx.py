"""PTX text -> instructions. Reads what Triton emits: one kernel, no functions, no local memory."""

import re
from dataclasses import dataclass, field

COMMENT = re.compile(r"//[^\n]*")
LOCATION = re.compile(r"\.loc[^\n]*?//\s*(\S+:\d+):\d+[^\n]*")
PARAMETER = re.compile(r"\.param\s+\.(\w+)[^,)]*?(\w+_param_\d+)")
LABEL = re.compile(r"\s*([$\w]+):")
SCOPE = re.compile(r"\s*[{}]")
REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+([^;]*);")
DIRECTIVE = re.compile(r"^\s*\.(reg|shared|loc|pragma)\b[^\n]*", re.MULTILINE)
SHARED = re.compile(r"\.shared\s+\.align\s+\d+\s+\.b8\s+(\w+)\[(\d+)\];")
GUARD = re.compile(r"@(!?)(%\w+)\s+")
OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*")


@dataclass(frozen=True)
class Address:
    """[base + offset]; ``base`` is a register or a symbol."""

    base: str
    offset: int


Operand = str | int | Address | tuple["Operand", ...]  # register, label, symbol or special; immediate's bits; vector


@dataclass(frozen=True)
class Instruction:
    """``guard``: (predicate, the value it must have) or None; ``parts``: the opcode, split at its dots; ``source``:
    file:line of the kernel."""

    text: str
    source: str
    guard: tuple[str, bool] | None
    parts: tuple[str, ...]
    operands: tuple[Operand, ...]


@dataclass
class Kernel:
    """``parameters``: name -> type, in order; ``declared``: register -> type, of those that have names instead of
    numbers; ``shared``: variable -> bytes; ``labels``: label -> index of the instruction behind it."""

    name: str
    parameters: dict[str, str]
    declared: dict[str, str] = field(default_factory=dict)
    shared: dict[str, int] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)


def _number(text: str) -> int | None:
    if re.fullmatch(r"0[fd][0-9A-Fa-f]+", text):
        return int(text[2:], 16)
    try:
        return int(text.rstrip("U"), 0)
    except ValueError:
        return None


def _operand(text: str) -> Operand:
    text = text.strip()
    if text.startswith("{"):
        return tuple(_operand(part) for part in text[1:-1].split(","))
    if text.startswith("["):
        base, _, offset = text[1:-1].partition("+")
        return Address(base.strip(), int(offset or 0))
    number = _number(text)
    return text if number is None else number


def _instruction(text: str, source: str) -> Instruction:
    guard, rest = None, text
    if match := GUARD.match(text):
        guard, rest = (match[2], not match[1]), text[match.end() :]
    opcode, _, operands = rest.partition(" ")
    return Instruction(text, source, guard, tuple(opcode.split(".")), tuple(map(_operand, OPERAND.findall(operands))))


def parse(text: str) -> Kernel:
    """The kernel in ``text``. Raises ValueError where it holds none."""
    text = COMMENT.sub("", LOCATION.sub(r";@@\1;", text))
    entry = re.search(r"\.entry\s+(\w+)\((.*?)\)[^{]*\{(.*?)\n\}", text, re.DOTALL)
    if not entry:
        raise ValueError("no .entry in this PTX")
    kernel = Kernel(entry[1], {name: kind for kind, name in PARAMETER.findall(entry[2])})
    source, body = "", entry[3]
    for kind, names in REGISTERS.findall(body):
        for name in (name.strip() for name in names.split(",") if "<" not in name):
            if kernel.declared.setdefault(name, kind) != kind:
                raise ValueError(f"{name} is a register of {kernel.declared[name]} and of {kind}: one of a kernel here")
    kernel.shared |= {name: int(size) for name, size in SHARED.findall(body)}
    for statement in DIRECTIVE.sub("", body).split(";"):
        rest = statement
        while begin := LABEL.match(rest) or SCOPE.match(rest):
            if begin.re is LABEL:
                kernel.labels[begin[1]] = len(kernel.instructions)
            rest = rest[begin.end() :]
        rest = " ".join(rest.split())
        if rest.startswith("@@"):
            source = rest[2:]
        elif rest:
            kernel.instructions.append(_instruction(rest, source))
    return kernel
