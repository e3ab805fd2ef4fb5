"""What the dense-plus-sparse kernels can reach, on paper: bytes, operations, the least times.

    python benchmarks/roofline.py        the tables of docs/ROOFLINE.md, in Markdown

The model is a maximum of four times (device memory, L2 to multiprocessors, instructions, tensor cores), each at its
full rate, plus what does not overlap (launches, the sum of shares, decoding before a product). Warps never wait in it:
for times that are to be expected see predict.py.

Beyond every tile a slice of the layer is decoded, then multiplied. Both run in waves of one program a processor, so a
slice of few rows leaves processors idle; one that the L2 does not hold goes through device memory, out and back. The
unquantized product is not charged for its waves, since its library may split columns: an advantage for bfloat16.
"""

import sys
from dataclasses import astuple, dataclass, replace
from itertools import product
from math import comb
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent / folder) for folder in ("kernels", ".")]

from requant_kernels.dense_sparse.triton.patches import PATCH
from requant_kernels.dense_sparse.triton.strips import BLOCK, STRIP
from requant_kernels.dense_sparse.triton.table import Decode, Table, Tile, evenly, tables, widened

from benchmarks.kernel_timing import shapes
from benchmarks.kernel_timing.shapes import EXPERTS, MODELS, SCHEMES, TOKENS, Experts, Shape
from benchmarks.prediction.gpus import GPUS, Gpu, product_tiles

MODEL = "Llama-3.1-8B"
DENSITY = 0.005
# A weight, of the loops on sm_90 (`make aot`), triton 3.6, without entries: of the middle W4, by stacks and whether
# whole blocks are copied or halves; one token by bits. One token adds some for a slot, the others for each weight what
# patching takes (patch.py), whatever the number of entries in one round.
MIDDLE_INSTRUCTIONS = {"whole": 3.46, "halves": 3.75, "stacked": 3.05}
PATCH_INSTRUCTIONS = {"whole": 0.39, "halves": 0.38, "stacked": 0.57}
DECODE_INSTRUCTIONS = 2.6
ONE_INSTRUCTIONS = {2: 1.24, 3: 1.34, 4: 1.22, 8: 1.10}
SLOT_INSTRUCTIONS = 14
# What a warp has before and behind its loop with one token, codes and entries.
BESIDE_THE_LOOP, BESIDE_THE_LOOP_OF_ENTRIES = 175, 80
PATCH_BITS = 32 / (STRIP * PATCH)  # a weight: where the entries of a patch begin
FILL = 1.65  # slots an entry, evenly scattered over 4096 columns
JOIN = 1e-6  # seconds: a share of the sums is stored, counted and read back (assumed)
EXPERT_TOKENS = (1, 4, 16, 64, 256, 1024)
WORKSPACES = (32, 64, 128, 256)  # MiB
SLICED_TOKENS = (512, 1024, 4096)
LAUNCH = 2.0e-6  # seconds, inside a graph


@dataclass(frozen=True)
class Prediction:
    """Seconds, and which of them decides."""

    memory: float
    l2: float
    issue: float
    tensor: float
    fixed: float

    @property
    def total(self) -> float:
        return max(self.memory, self.l2, self.issue, self.tensor) + self.fixed

    @property
    def bound(self) -> str:
        parts = {"memory": self.memory, "L2": self.l2, "issue": self.issue, "tensor": self.tensor}
        return max(parts, key=parts.__getitem__)


class Load(shapes.Load):
    """With what it reads and writes."""

    @property
    def stored(self) -> float:
        """Bytes of the layer that one pass over it reads."""
        return self.shape.weights * bits_a_weight(self.bits, self.group, self.density, self.tokens == 1) / 8

    @property
    def moved(self) -> int:
        """Bytes of x and y."""
        return 2 * self.tokens * (self.shape.rows + self.shape.columns)


def bits_a_weight(bits: int, group: int, density: float, one: bool) -> float:
    """What is read of the runtime layout: codes, 16-bit steps, and 32 bits a slot for one token, an entry for more."""
    return bits + 16 / group + (density * 32 * FILL if one else density * 32 + PATCH_BITS * (density > 0))


def matrix_kernel(gpu: Gpu, tile: Tile, load: Load) -> Prediction:
    shape, tokens = load.shape, load.tokens
    token_tiles = -(-tokens // tile.tokens)
    row_tiles = -(-shape.rows // (STRIP * tile.strips))
    blocks = -(-shape.columns // BLOCK)
    tile = widened(tile, row_tiles, blocks)
    wanted = tile.programs // (row_tiles * token_tiles)
    splits = max(1, min(wanted, -(-blocks // tile.k_warps), 16))
    one = tile.kernel == "one"
    of_slots = shape.weights * load.density * FILL * SLOT_INSTRUCTIONS
    if one:
        beside = BESIDE_THE_LOOP + BESIDE_THE_LOOP_OF_ENTRIES * (load.density > 0)
        instructions = (
            shape.weights * ONE_INSTRUCTIONS[load.bits] + of_slots + row_tiles * splits * tile.warps * 32 * beside
        )
    else:
        loop = "stacked" if tile.stacks > 1 else "whole" if tile.span == BLOCK else "halves"
        each = MIDDLE_INSTRUCTIONS[loop] + PATCH_INSTRUCTIONS[loop] * (load.density > 0)
        instructions = token_tiles * shape.weights * each
    activations = row_tiles * 2 * tokens * shape.columns  # what one token gathers fits into the L1
    shares = 8 * splits * tokens * shape.rows if splits > 1 else 0
    flops = 2 * max(8, tile.tokens) * token_tiles * shape.weights
    return Prediction(
        memory=(load.stored + load.moved) / gpu.copy,
        l2=(token_tiles * load.stored + activations + shares) / gpu.l2_rate,
        issue=instructions / gpu.instructions,
        tensor=flops / gpu.product / (0.6 if one else 1.0),  # mma.sync does not reach wgmma's rate
        fixed=LAUNCH + (splits > 1) * JOIN,
    )


def decode_and_multiply(gpu: Gpu, table: Table, load: Load) -> Prediction:
    rows, columns = load.shape.rows, load.shape.columns
    step = table.decode.slice_rows(rows, columns)
    parts = [
        _slice(gpu, table.decode, replace(load, shape=replace(load.shape, rows=min(step, rows - start))))
        for start in range(0, rows, step)
    ]
    return Prediction(*(sum(values) for values in zip(*map(astuple, parts), strict=True)))


def _slice(gpu: Gpu, decode: Decode, load: Load) -> Prediction:
    """One slice of a layer as if it were the whole: its decoding, then its product."""
    plain = 2 * load.shape.weights
    fits = plain <= gpu.l2_bytes
    written = plain / (gpu.l2_rate if fits else gpu.copy)
    instructions = load.shape.weights * DECODE_INSTRUCTIONS / gpu.instructions
    programs = -(-load.shape.rows // (STRIP * decode.strips))
    tiles = product_tiles(load.shape.rows, load.tokens)
    decoding = max(load.stored / gpu.copy, written, instructions) / gpu.utilisation(programs)
    return Prediction(
        memory=(load.moved + (0 if fits else plain)) / gpu.copy,
        l2=plain / gpu.l2_rate,
        issue=0.0,
        tensor=2 * load.tokens * load.shape.weights / gpu.product / gpu.utilisation(tiles),
        fixed=decoding + 2 * LAUNCH,
    )


def unquantized(gpu: Gpu, shape: Shape, tokens: int) -> float:
    moved = 2 * (shape.weights + tokens * (shape.rows + shape.columns))
    return max(moved / gpu.copy, 2 * tokens * shape.weights / gpu.product) + LAUNCH


def predict(gpu: Gpu, load: Load) -> Prediction:
    """The regime that the shipped table chooses."""
    table = tables()[gpu.table]
    tile = table.tile(load.tokens, load.bits, False)
    return matrix_kernel(gpu, tile, load) if tile else decode_and_multiply(gpu, table, load)


def row(gpu: Gpu, scheme: str, tokens: int) -> str:
    """All layers of the model together: time, bound, share of the copy rate, speed, cost of the sparse part."""
    bits, group = SCHEMES[scheme]
    tile = tables()[gpu.table].tile(tokens, bits, False)
    loads = [Load(shape, bits, group, DENSITY, tokens) for shape in MODELS[MODEL]]
    parts = [predict(gpu, load) for load in loads]
    time = sum(part.total for part in parts)
    bare = sum(predict(gpu, replace(load, density=0.0)).total for load in loads)
    plain = sum(unquantized(gpu, load.shape, tokens) for load in loads)
    share = sum(load.stored + load.moved for load in loads) / time / gpu.copy
    return (
        f"| {tokens} | {f'{tile.kernel} m{tile.tokens}' if tile else 'decode'} | {scheme} | {time * 1e6:.1f} "
        f"| {max(parts, key=lambda part: part.total).bound} | {f'{share:.0%}' if tile else ''} "
        f"| {plain / time:.2f} | {time / bare - 1:+.1%} |"
    )


def regime_table(gpu: Gpu) -> list[str]:
    lines = [
        f"### {gpu.name}: the linear layers of one block of {MODEL}, {DENSITY:.1%} sparse",
        "",
        "| tokens | kernel | scheme | us at least | bound by | of copy rate | x bf16 | sparse costs |",
        "|---:|---|---|---:|---|---:|---:|---:|",
    ]
    return [*lines, *(row(gpu, scheme, tokens) for tokens in TOKENS for scheme in SCHEMES), ""]


def workspace_table() -> list[str]:
    """How much of a layer to decode at a time, W4: a small slice stays in the L2, a large one keeps processors busy."""
    lines = [
        f"### Decoded slices of a block of {MODEL}: us at least by MiB",
        "",
        "| GPU | tokens | bf16 |" + "".join(f" {mib} |" for mib in WORKSPACES),
        "|---|---:|---:|" + "---:|" * len(WORKSPACES),
    ]
    bits, group = SCHEMES["W4 g128"]
    for gpu in GPUS.values():
        table = tables()[gpu.table]
        sized = [replace(table, decode=replace(table.decode, workspace_mib=mib)) for mib in WORKSPACES]
        for tokens in SLICED_TOKENS:
            loads = [Load(shape, bits, group, DENSITY, tokens) for shape in MODELS[MODEL]]
            times = [sum(decode_and_multiply(gpu, one, load).total for load in loads) for one in sized]
            plain = sum(unquantized(gpu, load.shape, tokens) for load in loads)
            lines.append(f"| {gpu.name} | {tokens} |" + "".join(f" {time * 1e6:.0f} |" for time in (plain, *times)))
    return [*lines, ""]


@dataclass(frozen=True)
class Routed:
    """A layer of experts at one number of tokens, whose experts are drawn at random."""

    model: Experts
    bits: int
    group: int
    density: float
    tokens: int

    @property
    def pairs(self) -> int:
        return self.tokens * self.model.top

    @property
    def reached(self) -> float:
        """Experts that any token goes to."""
        return self.model.experts * (1 - (1 - self.model.top / self.model.experts) ** self.tokens)

    def blocks(self, size: int) -> float:
        """Of so many tokens of one expert."""
        share = self.model.top / self.model.experts
        chances = (comb(self.tokens, n) * share**n * (1 - share) ** (self.tokens - n) for n in range(self.tokens + 1))
        return self.model.experts * sum(chance * -(-n // size) for n, chance in enumerate(chances))

    @property
    def products(self) -> tuple[Shape, Shape]:
        name, hidden, inner = self.model.name, self.model.hidden, self.model.inner
        return Shape(name, "gate_up", 2 * inner, hidden), Shape(name, "down", hidden, inner)


def routed(gpu: Gpu, load: Routed) -> float:
    """Seconds of a layer: its products at the blocks of tokens that there are, and the launches around them."""
    each = evenly(load.pairs, load.model.experts)
    tile = tables()[gpu.table].routed(load.tokens, each, load.bits, False)
    blocks = load.blocks(tile.tokens)
    total = 5 * LAUNCH  # blocks of pairs, products, activation, sum
    for shape in load.products:
        one = Load(shape, load.bits, load.group, load.density, tile.tokens)
        part = matrix_kernel(gpu, tile, one)  # of one block
        total += max(
            load.reached * one.stored / gpu.copy,
            *(blocks * seconds for seconds in (part.l2, part.issue, part.tensor)),
        )
    return total


def routed_unquantized(gpu: Gpu, load: Routed) -> float:
    """The same with bfloat16 weights and as many launches as vLLM's fused kernel has."""
    weights = sum(shape.weights for shape in load.products)
    return max(2 * load.reached * weights / gpu.copy, 2 * load.pairs * weights / gpu.product) + 5 * LAUNCH


def experts_table(gpu: Gpu) -> list[str]:
    lines = [
        f"### {gpu.name}: a layer of routed experts, W4 g128, {DENSITY:.1%} sparse",
        "",
        "| model | tokens | experts reached | us at least | bfloat16 us | x bf16 | sparse costs |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for model, tokens in product(EXPERTS, EXPERT_TOKENS):
        load = Routed(model, *SCHEMES["W4 g128"], DENSITY, tokens)
        time, bare = routed(gpu, load), routed(gpu, replace(load, density=0.0))
        plain = routed_unquantized(gpu, load)
        lines.append(
            f"| {model.name} | {tokens} | {load.reached:.0f} | {time * 1e6:.0f} | {plain * 1e6:.0f} "
            f"| {plain / time:.2f} | {time / bare - 1:+.1%} |"
        )
    return [*lines, ""]


def bytes_table() -> list[str]:
    lines = [
        "| scheme | sparse | bits a weight, one token | bytes against bf16 | more tokens |",
        "|---|---:|---:|---:|---:|",
    ]
    for scheme, (bits, group) in SCHEMES.items():
        for density in (0.0, 0.001, 0.005, 0.01):
            stored, more = (bits_a_weight(bits, group, density, one) for one in (True, False))
            lines.append(f"| {scheme} | {density:.1%} | {stored:.2f} | 1 / {16 / stored:.2f} | {more:.2f} |")
    return [*lines, ""]


def main() -> int:
    tables_of = [line for gpu in GPUS.values() for line in (*regime_table(gpu), *experts_table(gpu))]
    print("\n".join([*bytes_table(), *tables_of, *workspace_table()]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
