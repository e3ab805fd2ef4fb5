"""What the dense-plus-sparse kernels can reach, on paper: bytes, operations, predicted times.

    python benchmarks/roofline.py        the tables of docs/ROOFLINE.md, in Markdown

The model is a maximum of four times (device memory, L2 to multiprocessors, instructions, tensor cores) plus what does
not overlap (launches, transpose, reduction). It predicts no stalls: a measured time above it by half is ordinary.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent / folder) for folder in ("kernels", ".")]

from requant_kernels.dense_sparse.triton.lists import CHUNK
from requant_kernels.dense_sparse.triton.strips import BLOCK, STRIP
from requant_kernels.dense_sparse.triton.table import Table, Tile, tables

from benchmarks.kernel_timing.shapes import MODELS, SCHEMES, TOKENS, Shape

MODEL = "Llama-3.1-8B"
DENSITY = 0.005
INSTRUCTIONS = 2.9  # a weight, in the loops of few_kernel and middle_kernel on sm_90 (`make aot`, loop / weights)
SPARSE_INSTRUCTIONS = 40  # an entry, to build 16 rows of its one-hot matrix: compare, select, pack
GATHER_INSTRUCTIONS = 3.5  # an entry and token without x^T: address, load, pack; an eighth of that with x^T
FILL = 1.3  # entries of a list are padded to whole chunks


@dataclass(frozen=True)
class Gpu:
    """Rates: bytes/s of a copy, bytes/s from L2, FLOP/s of a large bf16 product; launch in seconds, inside a graph."""

    name: str
    table: str
    processors: int
    clock: float
    copy: float
    l2: float
    product: float
    launch: float = 2.0e-6

    @property
    def instructions(self) -> float:
        """Scalar instructions a second: four schedulers issue one of 32 lanes each cycle."""
        return self.processors * self.clock * 128


GPUS = (  # copy and product rates: 90 % and 80 % of the data sheet's; L2: assumed, not in any data sheet
    Gpu("H200", "h200", 132, 1.8e9, 4.3e12, 5.5e12, 790e12),
    Gpu("A100 80 GB", "a100", 108, 1.41e9, 1.84e12, 4.0e12, 250e12),
)


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


@dataclass(frozen=True)
class Load:
    """One layer at one number of tokens."""

    shape: Shape
    bits: int
    group: int
    density: float
    tokens: int

    @property
    def stored(self) -> float:
        """Bytes of the layer."""
        return self.shape.weights * bits_a_weight(self.bits, self.group, self.density) / 8

    @property
    def moved(self) -> int:
        """Bytes of x and y."""
        return 2 * self.tokens * (self.shape.rows + self.shape.columns)


def bits_a_weight(bits: int, group: int, density: float) -> float:
    """Of the runtime layout: codes, 16-bit steps, 32-bit entries in padded chunks with their segment numbers."""
    return bits + 16 / group + density * 32 * (1 + 1 / CHUNK) * FILL


def matrix_kernel(gpu: Gpu, tile: Tile, load: Load) -> Prediction:
    shape, tokens = load.shape, load.tokens
    token_tiles = -(-tokens // tile.tokens)
    row_tiles = -(-shape.rows // (STRIP * tile.strips))
    blocks = -(-shape.columns // BLOCK)
    wanted = tile.programs // (row_tiles * token_tiles)
    splits = max(1, min(wanted, -(-blocks // tile.k_warps), 16))
    entries = shape.weights * load.density * FILL
    gather = GATHER_INSTRUCTIONS * tile.tokens * (1 if tile.kernel == "few" else 1 / 8)
    instructions = token_tiles * (shape.weights * INSTRUCTIONS + entries * (SPARSE_INSTRUCTIONS + gather))
    activations = row_tiles * 2 * tokens * shape.columns
    shares = 8 * splits * tokens * shape.rows if splits > 1 else 0
    flops = 2 * tile.tokens * token_tiles * (shape.weights + entries * STRIP)
    launches = 1 + (splits > 1) + (tile.kernel == "middle" and load.density > 0)
    return Prediction(
        memory=(load.stored + load.moved) / gpu.copy,
        l2=(token_tiles * load.stored + activations + shares) / gpu.l2,
        issue=instructions / gpu.instructions,
        tensor=flops / gpu.product / (0.6 if tile.kernel == "few" else 1.0),  # mma.sync does not reach wgmma's rate
        fixed=launches * gpu.launch,
    )


def decode_and_multiply(gpu: Gpu, table: Table, load: Load) -> Prediction:
    plain = 2 * load.shape.weights
    slices = -(-plain // (table.decode.workspace_mib * 2**20))
    decode = max(load.stored / gpu.copy, plain / gpu.l2, load.shape.weights * INSTRUCTIONS / gpu.instructions)
    return Prediction(
        memory=load.moved / gpu.copy,
        l2=plain / gpu.l2,
        issue=0.0,
        tensor=2 * load.tokens * load.shape.weights / gpu.product,
        fixed=decode + 2 * slices * gpu.launch,
    )


def unquantized(gpu: Gpu, shape: Shape, tokens: int) -> float:
    moved = 2 * (shape.weights + tokens * (shape.rows + shape.columns))
    return max(moved / gpu.copy, 2 * tokens * shape.weights / gpu.product) + gpu.launch


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
        "| tokens | kernel | scheme | predicted us | bound by | of copy rate | x bf16 | sparse costs |",
        "|---:|---|---|---:|---|---:|---:|---:|",
    ]
    return [*lines, *(row(gpu, scheme, tokens) for tokens in TOKENS for scheme in SCHEMES), ""]


def bytes_table() -> list[str]:
    lines = ["| scheme | sparse | bits a weight | bytes against bf16 |", "|---|---:|---:|---:|"]
    for scheme, (bits, group) in SCHEMES.items():
        for density in (0.0, 0.001, 0.005, 0.01):
            stored = bits_a_weight(bits, group, density)
            lines.append(f"| {scheme} | {density:.1%} | {stored:.2f} | 1 / {16 / stored:.2f} |")
    return [*lines, ""]


def main() -> int:
    print("\n".join([*bytes_table(), *(line for gpu in GPUS for line in regime_table(gpu))]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
