"""What a GPU, and one multiprocessor of it, is given: for roofline.py and for predictions.

Copies of an H200 are as fast as measured (docs/BENCHMARKS.md), of an A100 as 90 % of the data sheet's rate, products as
80 % of it. Rates of instructions are NVIDIA's (CUDA C++ programming guide, throughput of native arithmetic
instructions); ``mma`` on Hopper issues at about 62 % of what wgmma reaches (arXiv 2402.13499). Latencies are what
others measured on Ampere and Hopper (arXiv 2208.11174, 2402.13499), to some ten percent. Four were fitted to launches
measured on an H200 (docs/ROOFLINE.md): ``issue``, ``fence``, ``l2`` and ``to_l2``.
"""

from dataclasses import dataclass

PRODUCT_TILE = 128  # rows, and tokens, of a program of the library's product


@dataclass(frozen=True)
class Gpu:
    """``copy``: bytes/s; ``product``: FLOP/s of a large one in bf16; ``clock``: cycles/s. ``l2``: bytes a cycle that
    one of ``processors`` gets; ``l2_bytes``: how large it is. Cycles of a scheduler for an instruction of a warp:
    ``mma`` for ``mma.m16n8k16`` in 16 bits, or ``m16n8k32`` in 8, ``float32``, ``half2``, and ``issue`` for any. Cycles
    until an access is done, and ``fence`` until all processors see what a warp has stored."""

    name: str
    table: str
    target: str
    processors: int
    clock: float
    copy: float
    product: float
    l2: float
    l2_bytes: int
    mma: int
    float32: int
    half2: int
    to_memory: int = 650
    to_l2: int = 350
    to_l1: int = 36
    to_shared: int = 26
    fence: int = 500
    issue: float = 1.6
    launch: float = 1.0e-6

    @property
    def memory(self) -> float:
        """Bytes a cycle that one processor gets."""
        return self.copy / self.processors / self.clock

    @property
    def l2_rate(self) -> float:
        """Bytes/s of all processors."""
        return self.l2 * self.processors * self.clock

    @property
    def instructions(self) -> float:
        """Scalar instructions a second: four schedulers issue one of 32 lanes each cycle."""
        return self.processors * self.clock * SCHEDULERS * 32

    def utilisation(self, programs: int) -> float:
        """The share of the processors that work while ``programs`` run, one on each, wave after wave."""
        return programs / (-(-programs // self.processors) * self.processors)


def product_tiles(rows: int, tokens: int) -> int:
    """Programs of the library's product."""
    return -(-tokens // PRODUCT_TILE) * -(-rows // PRODUCT_TILE)


H200 = Gpu("H200", "h200", "90", 132, 1.8e9, 4.23e12, 790e12, 50, 50 * 2**20, 6, 1, 1)
A100 = Gpu("A100 80 GB", "a100", "80", 108, 1.41e9, 1.84e12, 250e12, 50, 40 * 2**20, 8, 2, 2)
GPUS = {gpu.table: gpu for gpu in (H200, A100)}
REGISTERS, WARPS, SCHEDULERS = 65536, 64, 4  # of a processor
