"""Memory of a launch: its tensors, and the shared memory of each program. Faults on what a GPU would not do, or not
reliably: accesses out of bounds, misaligned, or unordered.

Two accesses are unordered, and one of them a write, if nothing keeps a GPU from doing them the other way round: by two
warps of a program with no barrier between, or by two programs, unless the later has acquired what the others released
(an atomic operation behind a barrier). That does not depend on the order in which warps and programs are run here.

The lanes of a warp, too, need a barrier between such accesses, bar.warp.sync. That is looked at in shared memory that
a kernel declares itself: what Triton exchanges within a warp it orders otherwise.
"""

import ctypes
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from tests.emulator.lanes import UNSIGNED, Array
from tests.emulator.traffic import Traffic

BLOCK = 16  # bytes; aligned blocks of so many never cross a page
WARPS = 256  # more than a program can have; the last stands for several
Range = tuple[int, int]  # addresses [begin, end)


class Fault(AssertionError):
    """What a kernel must not do."""


@dataclass
class Told:
    """What programs of a launch tell each other. ``released`` int64, of each the epoch in which it has told what it had
    done before; ``counts``: additions that changed something."""

    released: Array
    counts: int = 0


@dataclass
class Program:
    """One program of a launch. ``epoch``: its barriers so far. ``acquired``: what it has been told of each other one.
    ``looked``: ``Told.counts`` when it looked at a counter, the last two times since it has changed one."""

    at: tuple[int, int, int]
    number: int
    told: Told
    epoch: int = 1
    acquired: Array = field(init=False)
    looked: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.acquired = np.zeros_like(self.told.released)

    @property
    def waits(self) -> bool:
        """For others: it has looked again, and nothing has changed since."""
        return self.looked == [self.told.counts] * 2


@dataclass
class Actor:
    """A warp, as memory knows it. ``waited``: for the launch before, which runs at the same time until then. ``lanes``:
    those of the access under way; ``synced``: barriers that its lanes have passed together."""

    program: Program
    index: int
    waited: bool
    lanes: Array = field(init=False)
    synced: int = field(default=1, init=False)

    @property
    def id(self) -> int:
        return self.program.number * WARPS + self.index


class Tracker:
    """Who has read and written each byte last, and when."""

    def __init__(self, size: int):
        self._written, self._writer, self._read, self._reader = (np.zeros(size, dtype=np.int64) for _ in range(4))

    @staticmethod
    def _unordered(epochs: Array, ids: Array, actor: Actor) -> Array:
        others = (epochs > 0) & (ids != actor.id)
        if not others.any():
            return others
        program, owner = actor.program, ids // WARPS
        told = epochs < program.acquired[owner]
        return others & np.where(owner == program.number, epochs == program.epoch, ~told)

    def read(self, at: Array, actor: Actor) -> None:
        if self._unordered(self._written[at], self._writer[at], actor).any():
            raise Fault("reads what another warp may write at the same time")
        others = self._unordered(self._read[at], self._reader[at], actor)
        self._reader[at] = np.where(others, actor.program.number * WARPS + WARPS - 1, actor.id)
        self._read[at] = actor.program.epoch

    def write(self, at: Array, actor: Actor, same: Array | bool) -> None:
        """``same``: where the value is the one that is there, so that two may write it."""
        if self._unordered(self._read[at], self._reader[at], actor).any():
            raise Fault("overwrites what another warp may read at the same time")
        if (self._unordered(self._written[at], self._writer[at], actor) & ~np.asarray(same)).any():
            raise Fault("overwrites what another warp may write at the same time")
        self._writer[at] = actor.id
        self._written[at] = actor.program.epoch


class LaneTracker:
    """Which lane of a warp has read and written each byte last, and between which of its barriers; lane 32: several."""

    def __init__(self, size: int):
        self._written, self._read = (np.zeros(size, dtype=np.int64) for _ in range(2))
        self._writer, self._reader = (np.full(size, 32, dtype=np.int64) for _ in range(2))

    def read(self, at: Array, actor: Actor) -> None:
        lanes, now = self._now(at, actor)
        if ((self._written[at] == now) & (self._writer[at] != lanes) | (self._writer[at] == 32)).any():
            raise Fault("reads what another lane may write at the same time")
        self._reader[at] = np.where((self._read[at] == now) & (self._reader[at] != lanes), 32, lanes)
        self._read[at] = now

    def write(self, at: Array, actor: Actor) -> None:
        """What two lanes write at the same time is nobody's to read."""
        lanes, now = self._now(at, actor)
        if ((self._read[at] == now) & (self._reader[at] != lanes)).any():
            raise Fault("overwrites what another lane may read at the same time")
        clash = (self._written[at] == now) & (self._writer[at] != lanes)
        places, counts = np.unique(at, return_counts=True)
        self._writer[at] = np.where(clash | np.isin(at, places[counts > 1]), 32, lanes)
        self._written[at] = now

    @staticmethod
    def _now(at: Array, actor: Actor) -> tuple[Array, int]:
        """The lane of each byte, and a number for the time between two barriers of a warp."""
        lanes = actor.lanes.reshape(-1, *[1] * (at.ndim - 1))
        return np.broadcast_to(lanes, at.shape), actor.index << 32 | actor.synced


class Memory:
    """Bytes that items of 1, 2, 4 and 8 of them are read from and written to."""

    def __init__(self, everything: Array):
        self._by_size = {size: everything.view(kind) for size, kind in UNSIGNED.items()}
        self._tracker = Tracker(len(everything))

    def items(self, offsets: Array, size: int, count: int) -> Array:
        """Indices [lanes, count] of ``count`` items of ``size`` bytes from each offset on."""
        if (offsets % (size * count)).any():
            raise Fault(f"misaligned access of {size * count} bytes")
        return offsets[:, None] // size + np.arange(count)

    def peek(self, items: Array, size: int) -> Array:
        return self._by_size[size][items]

    def read(self, items: Array, size: int, actor: Actor) -> Array:
        self._tracker.read(self._bytes(items, size), actor)
        return self.peek(items, size)

    def write(self, items: Array, size: int, values: Array, actor: Actor) -> None:
        same = self.peek(items, size) == values
        self._tracker.write(self._bytes(items, size), actor, same[..., None])
        self._by_size[size][items] = values

    def announce(self, items: Array, size: int, actor: Actor) -> None:
        """A write that is on its way from now on."""
        self._tracker.write(self._bytes(items, size), actor, same=False)

    def count(self, item: int, then: Callable[[int], int], actor: Actor, order: str) -> int:
        """Atomically, 4 bytes; what was there before. With ``order`` release what the program did up to its last
        barrier comes before what others do that acquire it; acq_rel is both."""
        program, told = actor.program, actor.program.told
        before = int(self._by_size[4][item])
        self._by_size[4][item] = after = then(before) % 2**32
        if order in ("release", "acq_rel"):
            told.released[program.number] = program.epoch
        if order in ("acquire", "acq_rel"):
            program.acquired = told.released.copy()
        told.counts += after != before
        program.looked = [*program.looked[-1:], told.counts] if after == before else []
        return before

    @staticmethod
    def _bytes(items: Array, size: int) -> Array:
        return items[..., None] * size + np.arange(size)


class Shared(Memory):
    """Of one program; begins as NaN. ``declared`` bytes of it, the last, are the kernel's own."""

    def __init__(self, size: int, declared: int, traffic: Traffic | None):
        self._size, self._traffic = -(-size // BLOCK) * BLOCK, traffic
        self._own = self._size - declared
        self._lanes = LaneTracker(declared)
        super().__init__(np.full(self._size, 0xFF, dtype=np.uint8))

    def read(self, items: Array, size: int, actor: Actor) -> Array:
        if items.size and items.flat[0] * size >= self._own:
            self._lanes.read(self._bytes(items, size) - self._own, actor)
        return super().read(items, size, actor)

    def write(self, items: Array, size: int, values: Array, actor: Actor) -> None:
        if items.size and items.flat[0] * size >= self._own:
            self._lanes.write(self._bytes(items, size) - self._own, actor)
        super().write(items, size, values, actor)

    def locate(self, addresses: Array, size: int, count: int) -> Array:
        """``items`` of addresses."""
        offsets = addresses.astype(np.int64)
        if len(offsets) and offsets.max() + size * count > self._size:
            raise Fault(f"shared memory ends at {self._size}, access at {offsets.max()}")
        if self._traffic:
            self._traffic.shared(offsets, size * count)
        return self.items(offsets, size, count)


class Tensor(Memory):
    """Bytes [begin, end) of the host, in aligned blocks. ``fresh``: an earlier launch has written to them."""

    def __init__(self, begin: int, end: int, fresh: bool):
        self.begin, self.end, self.fresh, self.written = begin, end, fresh, False
        self.base = begin - begin % BLOCK
        size = -(-(end - self.base) // BLOCK) * BLOCK
        super().__init__(np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self.base)))

    def read(self, items: Array, size: int, actor: Actor) -> Array:
        if self.fresh and not actor.waited:
            raise Fault("reads what an earlier launch writes, before it has waited for it")
        return super().read(items, size, actor)

    def write(self, items: Array, size: int, values: Array, actor: Actor) -> None:
        if not actor.waited:
            raise Fault("writes before it has waited for the launch before, which may read")
        self.written = True
        super().write(items, size, values, actor)


class Global:
    """Everything that a launch was given; other addresses fault. ``written``: by launches before. ``traffic`` counts
    what becomes of this and of shared memory."""

    def __init__(self, ranges: Sequence[Range], written: Sequence[Range], traffic: Traffic | None = None):
        self.traffic = traffic
        merged: list[Range] = []
        for begin, end in sorted(ranges):
            if merged and begin < merged[-1][1]:
                merged[-1] = (merged[-1][0], max(merged[-1][1], end))
            elif end > begin:
                merged.append((begin, end))
        self._tensors = [
            Tensor(begin, end, any(begin < last and first < end for first, last in written)) for begin, end in merged
        ]
        self._begins = [tensor.begin for tensor in self._tensors]

    @property
    def written(self) -> list[Range]:
        return [(tensor.begin, tensor.end) for tensor in self._tensors if tensor.written]

    def locate(self, addresses: Array, size: int, count: int) -> tuple[Tensor, Array]:
        """The tensor that has them all, and ``items`` of it."""
        addresses = addresses.astype(np.int64)
        lowest, beyond = int(addresses.min()), int(addresses.max()) + size * count
        index = bisect_right(self._begins, lowest) - 1
        if index < 0 or beyond > self._tensors[index].end:
            raise Fault(f"global memory from {lowest:#x} to {beyond:#x} is in no tensor of this launch")
        tensor = self._tensors[index]
        if self.traffic:
            self.traffic.tensors(addresses, size * count)
        return tensor, tensor.items(addresses - tensor.base, size, count)
