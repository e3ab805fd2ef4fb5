"""The benchmark that is meant for a GPU runs, checks and reports anywhere."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "kernels.py"


def test_the_tiny_benchmark(tmp_path):
    pytest.importorskip("triton", reason="the package triton is not installed")
    report = tmp_path / "report.json"
    command = [sys.executable, str(SCRIPT), "--tiny", "--json", str(report)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    cells = json.loads(report.read_text())["cells"]
    assert {cell["tokens"] for cell in cells} >= {1, 20, 70}
    assert {"cuBLAS", "W4 g128", "W3 g128", "CSR alone"} <= {cell["kernel"] for cell in cells}
    assert all(cell["error"] < 1e-3 for cell in cells if cell["kernel"].startswith("W"))
    assert "0.5 % sparse costs" in done.stdout
