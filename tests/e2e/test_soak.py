"""A short soak of a server, and what its verdict is made of."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.soaking.memory import Sample, growth_bytes
from benchmarks.soaking.probes import PROMPTS, changed
from benchmarks.soaking.verdict import bad_lines, busy, failures

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "soak.py"


@pytest.mark.server
def test_a_short_soak(checkpoint, tmp_path):
    report = tmp_path / "report.json"
    # in so short a time the heaps still fill: the bound is that of the long run, doubled
    limits = ("--minutes", "2", "--streams", "6", "--growth-mb", "128", "--json", str(report))
    # on a GPU, whatever is compiled under load is an error
    serving = ("--vllm", "--enforce-eager", "--jit-monitor-mode", "error")
    command = [sys.executable, str(SCRIPT), str(checkpoint), *limits, *serving]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(report.read_text())
    assert found["failures"] == []
    assert set(found["requests"]) == {"complete", "stream", "cancel", "oversized", "malformed"}
    assert found["agreement_under_load"]["asked"] > 0
    assert all(memory > 0 for _, memory in found["resident_mb"])


def samples(*megabytes: float) -> list[Sample]:
    return [Sample(float(second), int(1e6 * held)) for second, held in enumerate(megabytes)]


def test_growth_counts_after_warm_up():
    warming = [*range(0, 900, 30), *[900] * 70]
    assert growth_bytes(samples(*warming)) == 0
    leaking = [500.0] * 30 + [500.0 + step for step in range(70)]
    assert growth_bytes(samples(*leaking)) == pytest.approx(56e6)


def test_gauges_that_are_not_zero_are_left_over():
    metrics = """# HELP vllm:num_requests_running Number of requests
vllm:num_requests_running{engine="0",model_name="m"} 2.0
vllm:num_requests_waiting{engine="0",model_name="m"} 0.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:prompt_tokens_total{engine="0",model_name="m"} 6403.0
"""
    assert busy(metrics) == {"num_requests_running": 2.0, "kv_cache_usage_perc": 0.25}


def test_what_a_log_must_not_hold():
    fine = """(APIServer pid=1) INFO:     127.0.0.1:5 - "POST /v1/completions HTTP/1.1" 400 Bad Request
(APIServer pid=1) INFO 11-22 Error-free"""
    assert bad_lines(fine) == []
    bad = """(EngineCore pid=2) ERROR 11-22 03:04:05 [core.py:9] it failed
(APIServer pid=1) INFO:     127.0.0.1:5 - "POST /v1/completions HTTP/1.1" 500 Internal Server Error"""
    assert bad_lines(f"{fine}\n{bad}") == bad.splitlines()


def test_a_line_for_whatever_does_not_hold():
    answers = ["same"] * len(PROMPTS)
    fine = {"unexpected": {}, "growth_mb": 3.0, "bound_mb": 4.0, "left_busy": {}, "changed": [], "log": ""}
    assert failures(**fine) == []
    other = changed(answers, ["other", *answers[1:]])
    assert other == ["probe 'She was': 'same' before, 'other' after"]
    bad = {
        "unexpected": {"stream: 500": 2},
        "growth_mb": 4.5,
        "left_busy": {"num_requests_running": 1.0},
        "changed": other,
        "log": "ERROR",
    }
    assert failures(**fine | bad) == [
        "2 x stream: 500",
        "memory grew by 4.5 MB after warm-up, more than 4.0",
        "after everyone had left: num_requests_running is 1",
        "1 errors in the server's log, such as\n  ERROR",
        *other,
    ]
    many = failures(**fine | {"unexpected": {f"stream: {number}": number for number in range(1, 9)}})
    assert many == [
        *(f"{number} x stream: {number}" for number in range(8, 3, -1)),
        "and 3 other kinds of answers that were not expected",
    ]
