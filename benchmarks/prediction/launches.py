"""Launches of the shipped tables, or of another tile, on a layer: what is compiled, how many programs, their paths."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from itertools import cycle, islice

import torch
from requant_kernels import aot
from requant_kernels.dense_sparse.triton.launch import fitted, grid_of, rest_at_once
from requant_kernels.dense_sparse.triton.layer import HERE, SYMMETRIC, WHOLE, Beside, Layer, build
from requant_kernels.dense_sparse.triton.strips import STRIP
from requant_kernels.dense_sparse.triton.table import Decode, Table, Tile, shared_out
from requant_kernels.dense_sparse.triton.variants import variant

from benchmarks.kernel_timing.layers import Setting, random_weight
from benchmarks.kernel_timing.shapes import Load
from benchmarks.prediction.code import Instruction, longest_loop, loops_of, parse, path
from benchmarks.prediction.gpus import REGISTERS, SCHEDULERS, WARPS, Gpu, product_tiles
from benchmarks.prediction.processor import Access, Processor

SAMPLE = 256  # rows of which a layer's slots and patches are laid out, to know how many there are of each
ROUNDS = 3  # of programs that a processor goes through; what comes after them is taken to go on like that
RESERVED = 1024  # bytes of shared memory that CUDA takes from each program

# Of what functions of the kernels read, all but codes, 16 bytes a lane, whose lanes share words: bytes of a warp. All
# other reads of theirs bring 32 lanes what they ask for, from memory.
_SHARED = {"_load": 32, "locate": 8, "locate_strips": 8, "deepest": 8, "fetch": 64, "load_levels": 64, "load_rows": 64}
_LEVELS = {
    "gather_all": "gather",
    "load_fours": "l1",
    "middle_kernel": "l2",
    "added_up": "l2",
    "all_arrived": "l2",
    "await_all": "l2",
    "locate": "l1",
}


@dataclass(frozen=True)
class Run:
    """``waits``: by instruction, the cycles that warps waited before it; ``issued``: the share of cycles in which a
    scheduler issues."""

    seconds: float
    waits: Counter[int]
    issued: float


@dataclass(frozen=True)
class Compiled:
    code: list[Instruction]
    warps: int
    registers: int
    shared: int

    def resident(self, gpu: Gpu) -> int:
        """Programs that fit a processor at a time."""
        registers = -(-self.registers // 8) * 8 * 32 * self.warps
        return min(
            REGISTERS // registers, WARPS // self.warps, aot.SHARED_MEMORY[gpu.target] // (self.shared + RESERVED)
        )


def access(one: Instruction) -> Access | None:
    """Of global memory; None of shared memory, and of what is no access."""
    if one.base not in ("LDG", "LDGSTS", "STG", "ATOMG", "REDG"):
        return None
    if one.base == "STG":
        return Access("l2" if one.function == "finish" else "memory", 32 * one.bytes)
    narrow = one.bytes < 16 and one.function in _SHARED
    return Access(_LEVELS.get(one.function, "memory"), _SHARED[one.function] if narrow else 32 * one.bytes)


@cache
def compiled(table: str, rule: Tile | Decode, load: Load, target: str, split: int) -> Compiled:
    one = variant(table, rule, load.bits, load.group, SYMMETRIC, "bf16", sparse=load.density > 0, split=split)
    layer, full = _laid_out(load)
    constants = dict(one.constants)
    if "BIAS" in constants:
        constants["BIAS"] = False
    if "ROUNDS" in constants:
        constants["ROUNDS"] = layer.rounds
    elif load.density:
        rest, more = rest_at_once(layer.rest, rule.k_warps, layer.group, layer.kind)
        constants |= {"Q": layer.steps, "REST": rest, "MORE": more, "FULL": full}
    one = replace(one, constants=constants)
    kernel = aot.compiled(one, target)
    code = parse(aot.dump(kernel, "nvdisasm", "-g", "-hex", "-c"))
    return Compiled(code, one.warps, aot.registers_of(kernel), aot.shared_of(kernel))


@cache
def _laid_out(load: Load) -> tuple[Layer, bool]:
    """As many rows of the layer as its shape has, and whether every block of columns has its steps of slots."""
    setting = Setting(torch.device("cpu"), torch.bfloat16)
    sample = replace(load.shape, rows=SAMPLE)
    tensors, ints = build(random_weight(sample, load.bits, load.group, load.density, setting))
    layer, strips = Layer.of(ints), load.shape.rows // STRIP
    full = not load.density or tensors["sparse_slots"].shape[1] >= layer.blocks * layer.steps
    return replace(layer, strips=strips, beside_slots=Beside(strips, 0, 0)), full


def paths(code: list[Instruction], iterations: int, splits: int) -> list[list[int]]:
    """What warps of a program go through, of each of ``splits`` programs that share a tile: where one alone adds up the
    shares, it is the first here."""
    loop = longest_loop(code)
    peeled = any("MMA" in one.name for one in code[: loop.start])  # the first iteration
    before, within = (sum(code[at].base == "LDGDEPBAR" for at in part) for part in (range(loop.start), loop))
    last = [at + len(code) * (code[at].base == "LDGSTS") for at in loop]  # of what comes behind the end
    ahead = min(before // within, iterations - peeled) if within else 0
    head = [*path(code, 0, loop.start), *list(loop) * (iterations - peeled - ahead), *last * ahead]
    tail = _all_added(code, path(code, loop.stop, len(code)), splits)
    first_exit = next(i for i, at in enumerate(tail) if code[at % len(code)].base == "EXIT")
    return [head + tail] + [head + tail[: first_exit + 1]] * (splits - 1)


def _all_added(code: list[Instruction], tail: list[int], splits: int) -> list[int]:
    """The way ``tail`` behind the last loop with those that add up shares of sums gone through as often as it takes: a
    loop of rows, where there is one, and within it one of shares, one or some at a time."""
    loops = loops_of(code)
    waiting = [loop for loop in loops if any(code[at].base == "CCTL" for at in loop)]  # for the programs of the tile
    adding = [loop for loop in loops if loop not in waiting and any(code[at].base == "LDG" for at in loop)]

    def bytes_of(base: str, where: Iterable[int]) -> int:
        return sum(code[at].bytes for at in where if code[at].base == base)

    found, begins = list[int](), dict[int, int]()
    counted, stored, rows = False, 0, 0
    for at in tail:
        begins[at] = len(found)
        found.append(at)
        counted |= code[at].base in ("ATOMG", "REDG")
        if not counted:
            stored = rows = stored + bytes_of("STG", [at])
        for loop in (loop for loop in adding if counted and at in (loop.start, loop[-1])):
            once, out = found[begins[loop.start] :], 2 * bytes_of("STG", loop)  # 16 bits of fp32
            if at == loop.start:
                rows = out or rows
            elif out:  # who has waited adds up a part of the tile
                found[begins[loop.start] :] = _repeated(code, once, stored / out / (splits if waiting else 1))
            else:
                found[begins[loop.start] :] = _repeated(code, once, splits / (bytes_of("LDG", loop) // rows))
    return found


def _repeated(code: list[Instruction], way: list[int], times: float) -> list[int]:
    """The last time with those accesses masked out that are too many."""
    whole = int(times)
    active = Counter(code[at].base for at in way if at < len(code))
    seen, rest = Counter[str](), list[int]()
    for at in way if times > whole else ():
        base = code[at % len(code)].base
        seen[base] += at < len(code)
        masked = base in ("LDG", "STG") and at < len(code) and seen[base] > (times - whole) * active[base]
        rest.append(at + len(code) * masked)
    return way * whole + rest


def in_turn(gpu: Gpu, ways: list[list[int]], programs: int) -> list[list[int]]:
    """What a processor goes through of ``programs`` on all of them, whose warps take ``ways`` in turn; the last that
    it starts the first of them."""
    return list(islice(cycle(ways), -(-programs // gpu.processors)))[::-1]


def run(one: Compiled, place: Callable[[Instruction], Access | None], gpu: Gpu, ways: list[list[int]]) -> Run:
    """On a processor that goes through ``ways``, a program each."""
    some = ways[: ROUNDS * one.resident(gpu)]
    processor = Processor(one.code, place, gpu, one.warps)
    cycles = processor.run(some, len(some), one.resident(gpu))
    issued = sum(map(len, some)) * one.warps
    return Run(cycles * (len(ways) / len(some)) / gpu.clock + gpu.launch, processor.waits, issued / SCHEDULERS / cycles)


def product_seconds(gpu: Gpu, rows: int, columns: int, tokens: int, busy: float = 1.0) -> float:
    """The library's product in bfloat16: as its bytes or its operations take, with a share of the processors."""
    moved = 2 * (rows * columns + tokens * (rows + columns))
    return max(moved / gpu.copy, 2 * tokens * rows * columns / gpu.product / busy) + gpu.launch


class Predictor:
    """Seconds of layers on a GPU, as ``table`` launches them. ``waits``: of all of them so far, by line of source and
    instruction, the cycles that warps waited before it."""

    def __init__(self, gpu: Gpu, table: Table) -> None:
        self.gpu, self.table = gpu, table
        self.waits: Counter[tuple[str, str]] = Counter()

    def __call__(self, load: Load) -> float:
        tile = self.table.tile(load.tokens, load.bits, False)
        return self._tile(tile, load) if tile else self._decode(self.table.decode, load)

    def _tile(self, tile: Tile, load: Load) -> float:
        layer, _ = _laid_out(load)
        token_tiles = -(-load.tokens // tile.tokens)
        tile = fitted(layer, tile, token_tiles)
        token_tiles, row_tiles, splits = grid_of(layer, tile, token_tiles)
        split = HERE if splits > 1 else WHOLE
        one = compiled(
            self.gpu.table, replace(tile, up_to=tile.tokens), replace(load, tokens=1), self.gpu.target, split
        )
        ends = [tile.steps(layer.blocks) * k // splits for k in range(splits + 1)]
        shares = [ends[k + 1] - ends[k] for k in range(splits)]
        programs = token_tiles * row_tiles * splits
        if tile.kernel == "one":
            return self._launch(one, in_turn(self.gpu, paths(one.code, max(shares), splits), programs))
        started = (
            [shares[at % splits] for at in range(programs)[p :: self.gpu.processors]]
            for p in range(self.gpu.processors)
        )
        # Long launches are slower for the power that they take: as fast as the library's largest products, at most.
        least = 2 * load.tokens * load.shape.weights / self.gpu.product + self.gpu.launch
        return max(least, self._launch(one, [paths(one.code, share, splits)[0] for share in max(started, key=sum)]))

    def _decode(self, decode: Decode, load: Load) -> float:
        """A slice of the layer at a time: its decoding, then the library's product, on processors that have a tile."""
        rows, columns = load.shape.rows, load.shape.columns
        layer, _ = _laid_out(load)
        decode = shared_out(decode, layer.blocks)
        one = compiled(self.gpu.table, decode, replace(load, tokens=1), self.gpu.target, WHOLE)
        ways = paths(one.code, -(-layer.blocks // decode.k_warps), 1)
        step, total = self.table.decode.slice_rows(rows, columns), 0.0
        for start in range(0, rows, step):
            slice_rows = min(step, rows - start)
            total += self._launch(one, in_turn(self.gpu, ways, -(-slice_rows // (STRIP * decode.strips))))
            busy = self.gpu.utilisation(product_tiles(slice_rows, load.tokens))
            total += product_seconds(self.gpu, slice_rows, columns, load.tokens, busy)
        return total

    def _launch(self, one: Compiled, ways: list[list[int]]) -> float:
        done = run(one, access, self.gpu, ways)
        for at, waited in done.waits.items():
            self.waits[one.code[at].line, one.code[at].name] += waited
        return done.seconds
