"""What a kernel asks of memory: cycles of shared memory, and sectors and lines of global memory, by line of source.

A cycle of shared memory serves 32 banks of 4 bytes, a sector is 32 bytes, a line 128; the first level cache looks up
one line a cycle.
"""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from tests.emulator.lanes import Array
from tests.emulator.ptx import Instruction

WORD, BANKS = 4, 32
CYCLE = WORD * BANKS  # bytes at best
SECTOR, LINE = 32, 128


@dataclass
class Count:
    """``runs`` by warps; ``cycles`` of shared memory, of which ``least`` would do without conflicts of banks."""

    runs: int = 0
    cycles: int = 0
    least: int = 0
    sectors: int = 0
    lines: int = 0


class Traffic:
    """``counts`` by kernel, line of source and operation."""

    def __init__(self) -> None:
        self.counts: dict[tuple[str, str, str], Count] = defaultdict(Count)
        self._now = Count()
        self._fetched = False

    def begin(self, kernel: str, instruction: Instruction) -> None:
        self._now = self.counts[kernel, instruction.source, ".".join(instruction.parts)]
        self._now.runs += 1
        self._fetched = instruction.parts[0] == "wgmma"  # by the tensor cores, which swizzled rows do not hinder

    def shared(self, addresses: Array, size: int) -> None:
        """An access of ``size`` bytes at each address: as many lanes at a time as fit a cycle."""
        if self._fetched:
            return
        together = max(1, min(len(addresses), CYCLE // size))
        for start in range(0, len(addresses), together):
            words = np.unique(addresses[start : start + together, None] // WORD + np.arange(-(-size // WORD)))
            self._now.cycles += int(np.bincount(words % BANKS).max())
            self._now.least += -(-len(words) // BANKS)

    def tensors(self, addresses: Array, size: int) -> None:
        """The same in global memory."""
        words = addresses[:, None] // WORD * WORD + np.arange(0, size, WORD)
        self._now.sectors += len(np.unique(words // SECTOR))
        self._now.lines += len(np.unique(words // LINE))
