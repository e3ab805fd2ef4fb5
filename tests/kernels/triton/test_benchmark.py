"""The benchmark that is meant for a GPU runs, checks and reports anywhere."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "kernels.py"


def measured(tmp_path, *options):
    """Cells and what was printed."""
    pytest.importorskip("triton", reason="the package triton is not installed")
    report = tmp_path / "report.json"
    command = [sys.executable, str(SCRIPT), "--tiny", "--json", str(report), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(report.read_text())["cells"], done.stdout


def test_the_tiny_benchmark(tmp_path):
    cells, said = measured(tmp_path)
    assert {cell["tokens"] for cell in cells} >= {1, 20, 70}
    assert {"cuBLAS", "W4 g128", "W3 g128", "CSR alone"} <= {cell["kernel"] for cell in cells}
    assert all(cell["error"] < 1e-3 for cell in cells if cell["kernel"].startswith("W"))
    assert "0.5 % sparse costs" in said


def test_the_tiny_benchmark_of_int8_layers(tmp_path):
    cells, said = measured(tmp_path, "--w8a8")
    kinds = {"W8A8 dynamic", "W8A8 zero point", "W8A8 static"}
    assert {"cuBLAS", "cuBLAS int8"} | kinds == {cell["kernel"] for cell in cells}
    assert all(cell["error"] < 1e-3 for cell in cells if cell["kernel"] in kinds)
    assert "W8A8 dynamic" in said
