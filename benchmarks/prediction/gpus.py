"""What one multiprocessor of a GPU is given, in cycles and bytes a cycle.

Rates of copies and products are those of benchmarks/roofline.py. Rates of instructions are NVIDIA's (CUDA C++
programming guide, throughput of native arithmetic instructions); ``mma`` on Hopper issues at about 62 % of what wgmma
reaches (arXiv 2402.13499). Latencies are what others measured on Ampere and Hopper (arXiv 2208.11174, 2402.13499), to
some ten percent. How much the L2 gives a processor is the only one that was fitted: to tiles of 64 tokens, measured on
an H200 (docs/ROOFLINE.md).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """``memory`` and ``l2``: bytes a cycle that one of ``processors`` gets. Cycles of a scheduler for an instruction of
    a warp: ``mma`` for ``mma.m16n8k16`` in 16 bits, or ``m16n8k32`` in 8, ``float32``, ``half2``."""

    name: str
    table: str
    target: str
    processors: int
    clock: float
    memory: float
    l2: float
    shared: int
    product: float
    mma: int
    float32: int
    half2: int
    to_memory: int = 650
    to_l2: int = 280
    to_l1: int = 36
    to_shared: int = 26
    launch: float = 1.0e-6


H200 = Gpu("H200", "h200", "90", 132, 1.8e9, 4.23e12 / 132 / 1.8e9, 40, 232448, 790e12, 6, 1, 1)
A100 = Gpu("A100 80 GB", "a100", "80", 108, 1.41e9, 1.84e12 / 108 / 1.41e9, 40, 166912, 250e12, 8, 2, 2)
GPUS = {gpu.table: gpu for gpu in (H200, A100)}
REGISTERS, WARPS, SCHEDULERS = 65536, 64, 4  # of a processor
