"""The benchmark that is meant for a GPU runs, checks and reports anywhere."""

import contextlib
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
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


def test_the_tiny_benchmark_of_experts(tmp_path):
    pytest.importorskip("triton", reason="the package triton is not installed")
    report = tmp_path / "report.json"
    command = [sys.executable, str(SCRIPT.with_name("experts.py")), "--tiny", "--json", str(report)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    cells = json.loads(report.read_text())["cells"]
    ours = [cell for cell in cells if cell["kernel"].startswith("W4 g128")]
    assert {(cell["kernel"][-4:], cell["tokens"]) for cell in ours} == {
        (density, tokens) for density in ("0.5%", "0.0%") for tokens in (1, 6)
    }
    assert all(cell["error"] < 1e-3 for cell in ours)


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


def run(units, path, seconds=60.0):
    """The record of a run on this machine's processors."""
    from benchmarks.kernel_timing import recording

    record = recording.Record(path, {"device": "none"})
    recording.run(units, record, torch.device("cpu"), time.monotonic() + seconds)
    record.write()
    return record


def cell(number):
    from benchmarks.kernel_timing.cells import Cell

    return Cell("model", "layer", 1, 1, f"kernel {number}", 1, (1.0, 1.0), 1)


def failing(number, error):
    yield cell(number)
    raise error


def test_a_unit_that_fails_costs_only_itself(tmp_path):
    from benchmarks.kernel_timing.recording import Unit

    path = tmp_path / "report.json"
    wrong = ArithmeticError("relative error 1.0\nof an output")
    run([Unit("one", iter([cell(1)])), Unit("two", failing(2, wrong)), Unit("three", iter([cell(3)]))], path)
    report = json.loads(path.read_text())
    assert [cell["kernel"] for cell in report["cells"]] == ["kernel 1", "kernel 2", "kernel 3"]
    [failure] = report["failures"]
    assert (failure["unit"], failure["error"]) == ("two", "ArithmeticError: relative error 1.0")
    assert "in failing" in failure["traceback"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_lost_device_ends_the_run(tmp_path, monkeypatch):
    from benchmarks.kernel_timing import recording
    from benchmarks.kernel_timing.recording import Unit

    monkeypatch.setattr(recording, "usable", lambda _: False)
    lost = RuntimeError("CUDA error: an illegal memory access was encountered")
    record = run([Unit("one", failing(1, lost)), Unit("two", iter([cell(2)]))], tmp_path / "report.json")
    assert [cell.kernel for cell in record.cells] == ["kernel 1"]
    assert [failure["unit"] for failure in record.failures] == ["one"]


def test_what_the_time_does_not_allow_is_named_and_the_rest_is_kept(tmp_path):
    from benchmarks.kernel_timing.recording import Unit

    def slow():
        yield cell(1)
        time.sleep(0.2)
        yield cell(2)

    path = tmp_path / "report.json"
    run([Unit("slow", slow()), Unit("late", failing(3, RuntimeError()))], path, seconds=0.1)
    report = json.loads(path.read_text())
    assert [cell["kernel"] for cell in report["cells"]] == ["kernel 1", "kernel 2"]
    assert (report["left_out"], report["failures"]) == (["late"], [])


def test_the_file_grows_while_a_unit_runs(tmp_path, monkeypatch):
    from benchmarks.kernel_timing import recording
    from benchmarks.kernel_timing.recording import Unit

    monkeypatch.setattr(recording, "SECONDS_BETWEEN_WRITES", 0)
    path, seen = tmp_path / "report.json", []

    def cells():
        yield cell(1)
        seen.extend(json.loads(path.read_text())["cells"])
        yield cell(2)

    run([Unit("one", cells())], path)
    assert [one["kernel"] for one in seen] == ["kernel 1"]


BROKEN = """
import os, signal, sys
sys.path[:0] = [{root!r}]
from benchmarks import kernels
from benchmarks.kernel_timing import cells, peers

def quantized(shape, scheme, density, tokens, setting):
    if scheme == "W3 g128":
        {what}
    yield cells.cell(shape, scheme, 1, (1.0, 1.0), 1, density=density, error=0.0)

cells.quantized, peers.vllm_ready = quantized, lambda setting: 1 / 0
cells.separate_sparse = lambda *_: iter(())
sys.exit(kernels.main())
"""


@pytest.mark.parametrize(
    ("what", "status", "failures"),
    [
        (
            "raise ArithmeticError('wrong')",
            1,
            ["tiny square W3 g128 0.0%", "tiny square W3 g128 0.5%", "vLLM's kernels"],
        ),
        ("os.kill(os.getpid(), signal.SIGTERM)", 128 + signal.SIGTERM, []),
    ],
)
def test_the_benchmark_loses_nothing(tmp_path, what, status, failures):
    """Units that fail, vLLM that can not be made ready, and an end from outside."""
    pytest.importorskip("triton", reason="the package triton is not installed")
    report = tmp_path / "report.json"
    program = BROKEN.format(root=str(SCRIPT.parents[1]), what=what)
    command = [sys.executable, "-c", program, "--tiny", "--json", str(report)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    written = json.loads(report.read_text())
    assert [failure["unit"] for failure in written["failures"]] == failures
    assert {"cuBLAS", "W4 g128"} <= {cell["kernel"] for cell in written["cells"]}
    assert "tiny, all layers together" in done.stdout
    assert all(f"{name}: FAILED: " in done.stdout for name in failures)


def test_units_come_in_the_order_of_importance():
    from benchmarks.kernel_timing import layers, shapes, units

    setting = layers.Setting(torch.device("cpu"), torch.float16)
    plan = units.Plan(list(shapes.MODELS.values()), setting)
    with contextlib.ExitStack() as stack:
        names = [unit.name for unit in units.dense_sparse(plan, stack)]
    first, second = "Llama-3.1-8B", "Llama-3.2-1B"
    kinds = [
        rf"{first} \w+ cuBLAS",
        rf"{first} \w+ W4 g128 0\.[05]%",
        rf"{first} \w+ W[32] g128 0\.[05]%",
        "vLLM's kernels",
        rf"{first} \w+ gemlite W\d g128",
        rf"{first} \w+ W\d g128 (0\.1|1\.0)%",
        rf"{second} \w+ cuBLAS",
    ]
    found = [[at for at, name in enumerate(names) if re.fullmatch(kind, name)] for kind in kinds]
    assert all(found)
    assert all(before[-1] < after[0] for before, after in itertools.pairwise(found))
    assert all(name.endswith("CSR") for name in names[-16:])
    assert len(names) == len(set(names)) == 16 * (1 + 3 * 4 + 3 + 1) + 1


def test_a_worker_that_dies_costs_its_own_task():
    from benchmarks.kernel_timing.compilation import LATE, compile_all

    cpu = torch.device("cpu")
    tasks = [partial(os._exit, 3), partial(math.sqrt, -1), partial(math.sqrt, 1), partial(math.sqrt, 4)]
    died, raised, *fine = compile_all(tasks, 2, cpu, 120)
    assert died == "its process died"
    assert raised.startswith("ValueError: ")
    assert fine == ["", ""]
    assert compile_all([partial(math.sqrt, 1)], 1, cpu, 0) == [LATE]
