"""Cycles of shared memory, sectors and lines are counted as the hardware serves them."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.emulator.ptx import Instruction
from tests.emulator.traffic import Count, Traffic

LANES = np.arange(32)


def counted(method: str, addresses: np.ndarray, size: int) -> Count:
    traffic = Traffic()
    traffic.begin("kernel", Instruction("", "file.py:1", None, ("ld", "shared"), ()))
    getattr(traffic, method)(addresses, size)
    return traffic.counts["kernel", "file.py:1", "ld.shared"]


@pytest.mark.parametrize(
    ("addresses", "size", "cycles", "least"),
    [
        (4 * LANES, 4, 1, 1),
        (0 * LANES, 4, 1, 1),  # all read one word
        (128 * LANES, 4, 32, 1),  # all in one bank
        (8 * LANES, 4, 2, 1),
        (8 * LANES, 8, 2, 2),
        (16 * LANES, 16, 4, 4),
        (2 * LANES, 2, 1, 1),
        (256 * LANES[:8], 16, 8, 1),  # rows of one matrix, all in the same banks
    ],
)
def test_banks(addresses, size, cycles, least):
    count = counted("shared", addresses, size)
    assert (count.runs, count.cycles, count.least) == (1, cycles, least)


@pytest.mark.parametrize(
    ("addresses", "size", "sectors", "lines"),
    [
        (4 * LANES, 4, 4, 1),
        (16 * LANES, 16, 16, 4),
        (2 * LANES + 1024, 2, 2, 1),
        (4096 * LANES, 2, 32, 32),
        (16 + 128 * LANES, 16, 32, 32),
    ],
)
def test_sectors(addresses, size, sectors, lines):
    count = counted("tensors", addresses, size)
    assert (count.sectors, count.lines) == (sectors, lines)


def test_the_command_counts_what_a_layer_must_read():
    script = Path(__file__).parents[2] / "benchmarks" / "traffic.py"
    command = [sys.executable, str(script), "--rows", "128", "--columns", "256", "--density", "0"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    words = next(line for line in lines if "ld.global.cg.v4.b32" in line)
    assert words.split("|")[7].strip() == str(128 * 256 * 4 // 8 // 32)  # sectors
