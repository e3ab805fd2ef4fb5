"""`requant bench` on a tiny model with tiny workloads: what it prints and writes, and that Ctrl-C leaves nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from uuid import uuid4

import pytest

from tests.e2e.conftest import requant

pytestmark = pytest.mark.server

TINY = ("--streams", "2", "--workloads", "decode:8:8", "--repetitions", "1")
SERVE = ("--vllm", "--enforce-eager")


def test_two_models_are_compared(checkpoint, micro_llama, tmp_path):
    report = tmp_path / "report.json"
    printed = requant("bench", checkpoint, "--against", f"{micro_llama}@float32", *TINY, "--json", report, *SERVE)
    names = ["micro-llama-w4, bfloat16", "micro-llama-en, float32"]
    speeds = [line for line in printed.splitlines() if line.startswith("| decode, 2 streams |")]
    assert [line.split(" | ")[1] for line in speeds] == names
    found = json.loads(report.read_text())
    assert list(found["models"]) == names
    for footprint in found["models"].values():
        assert min(footprint.values()) > 0
    for row in found["results"]:
        [figures] = row["repetitions"]
        assert (figures["completed"], figures["failed"]) == (row["prompts"], 0)
    assert found["ratios"]["decode"]["2"] > 0
    assert found["versions"]["vllm"]
    assert "--enforce-eager" in found["settings"]


def marked(mark: str) -> list[str]:
    """Commands of living processes that were started, by whomever, with ``mark`` in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            # a zombie has no environment
            if mark.encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_text())
        except OSError:  # it has just ended, or is another user's
            continue
    return found


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes through /proc")
def test_ctrl_c_leaves_what_was_measured_and_no_process(micro_llama, ctrl_c, tmp_path):
    mark, report = uuid4().hex, tmp_path / "report.json"
    command = [sys.executable, "-m", "requant.cli", "bench", str(micro_llama), *TINY]
    command += ["--repetitions", "1000", "--json", str(report), *SERVE]
    environment = os.environ | {"REQUANT_TEST_MARK": mark}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as user:
        # the server is up: vLLM's client runs beside it
        while not report.exists() or not any("cli.main\0bench" in one for one in marked(mark)):
            assert user.poll() is None
            time.sleep(0.1)
        assert any("cli.main\0serve" in one for one in marked(mark))
        user.send_signal(signal.SIGINT)
        _, errors = user.communicate()
    assert user.returncode == 130
    assert errors.splitlines()[-1] == "interrupted"
    assert not marked(mark)
    assert json.loads(report.read_text())["results"][0]["repetitions"]
