"""The command line as users run it, and one checkpoint that it makes."""

import subprocess
import sys
from pathlib import Path

import pytest


def requant(*arguments: str | Path) -> str:
    command = [sys.executable, "-m", "requant.cli", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, micro_llama) -> Path:
    """Of the fixture model, 4 bit and 0.5 % sparse; never written to."""
    out = tmp_path_factory.mktemp("quantized") / "micro-llama-w4"
    requant("quantize", micro_llama, "-o", out, "--bits", "4", "--group-size", "64", "--outliers", "0.5%")
    return out
