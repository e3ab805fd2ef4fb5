"""The benchmark that is meant for a GPU runs, checks and reports anywhere."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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
    # on a GPU they are timed, or say why not; here vLLM is there and has no GPU
    assert "Marlin W4 g128: not measured: Marlin only supported on CUDA" in said or torch.cuda.is_available()


def test_the_tiny_benchmark_of_int8_layers(tmp_path):
    cells, said = measured(tmp_path, "--w8a8")
    kinds = {"W8A8 dynamic", "W8A8 zero point", "W8A8 static"}
    assert {"cuBLAS", "cuBLAS int8"} | kinds == {cell["kernel"] for cell in cells}
    assert all(cell["error"] < 1e-3 for cell in cells if cell["kernel"] in kinds)
    assert "W8A8 dynamic" in said
    assert "vLLM cutlass: not measured: " in said or torch.cuda.is_available()


def test_peers_multiply_by_our_weights():
    """What vLLM's Triton kernel makes of the layer that we hand it, decoded as that kernel decodes it."""
    pytest.importorskip("vllm", reason="the package vllm is not installed")
    from benchmarks.kernel_timing import layers, peers
    from benchmarks.kernel_timing.shapes import Shape

    setting = layers.Setting(torch.device("cpu"), torch.float16)
    weight = layers.random_weight(Shape("any", "any", 24, 256), 4, 128, 0.0, setting)
    with peers.vllm_ready(setting) as linear:
        layer = peers.vllm_layer(weight)
        kernel = linear.TritonW4A16LinearKernel.__new__(linear.TritonW4A16LinearKernel)
        kernel.w_q_name, kernel.w_s_name, kernel.w_zp_name = "weight_packed", "weight_scale", None
        kernel.process_weights_after_loading(layer)
    shifts = 4 * torch.arange(8)  # eight outputs in a word [K, N / 8], the step of a group [K / 128, N]
    codes = ((layer.weight_packed[..., None] >> shifts) & 15).flatten(1)
    decoded = (codes - 8).float() * layer.weight_scale.float().repeat_interleave(128, 0)
    assert torch.equal(decoded.T, layers.exact_weight(weight))
