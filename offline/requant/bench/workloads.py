"""What is asked of a server: kinds of requests of fixed lengths, a number of them at a time."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

MARGIN = 16  # tokens that a tokenizer may add to a prompt


@dataclass(frozen=True)
class Shape:
    """Requests of ``input`` random tokens, each answered by exactly ``output``."""

    kind: str
    input: int
    output: int

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """``KIND`` or ``KIND:INPUT:OUTPUT``. Raises ValueError."""
        kind, *lengths = text.split(":")
        if kind not in SHAPES or len(lengths) not in (0, 2):
            raise ValueError(text)
        shape = cls(kind, *map(int, lengths)) if lengths else SHAPES[kind]
        if min(shape.input, shape.output) < 1:
            raise ValueError(text)
        return shape


SHAPES = {shape.kind: shape for shape in (Shape("decode", 32, 96), Shape("prefill", 1024, 1), Shape("mixed", 256, 64))}


@dataclass(frozen=True)
class Workload:
    """``streams`` requests of a shape at a time."""

    shape: Shape
    streams: int

    @property
    def name(self) -> str:
        return f"{self.shape.kind}, {self.streams} stream{'s' * (self.streams > 1)}"

    @property
    def prompts(self) -> int:
        """Requests in a repetition: every stream is filled a second time."""
        return max(4, 2 * self.streams)

    @property
    def throughput(self) -> str:
        """Which of the client's figures is meant, in tokens a second: those made, or prompts included."""
        return "output_throughput" if self.shape.kind == "decode" else "total_token_throughput"


def workloads(shapes: Iterable[Shape], streams: Iterable[int]) -> list[Workload]:
    """Each shape at each number of streams."""
    return [Workload(shape, count) for shape, count in product(shapes, streams)]


def longest(works: Iterable[Workload]) -> int:
    """Tokens of the longest request: what a server must allow."""
    return MARGIN + max(work.shape.input + work.shape.output for work in works)
