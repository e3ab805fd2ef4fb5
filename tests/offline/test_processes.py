"""A program and its children: all ended, all counted."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from requant import processes
from requant.processes import members, peak_resident_bytes, resident_bytes, session

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes through /proc")

PARENT_AND_CHILD = """
import subprocess, sys, time
held = bytearray(50_000_000)
child = "held = bytearray(50_000_000); print('up'); import time; time.sleep(600)"
subprocess.Popen([sys.executable, "-c", child])
{then}
"""


def started(tmp_path: Path, then: str):
    log = tmp_path / "log"
    # -u: the child's line is what the tests wait for
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    return session([sys.executable, "-c", PARENT_AND_CHILD.format(then=then)], log=log, environment=environment)


def await_child(tmp_path: Path) -> None:
    while "up" not in (tmp_path / "log").read_text():
        time.sleep(0.05)


def test_children_count_and_end_too(tmp_path):
    with started(tmp_path, "time.sleep(600)") as process:
        await_child(tmp_path)
        assert len(members(process.pid)) == 2
        assert peak_resident_bytes(process.pid) >= resident_bytes(process.pid) > 100_000_000
    assert process.returncode
    assert not members(process.pid)


def test_what_a_shell_runs_in_the_background_ends_as_soon(tmp_path):
    """There SIGINT is ignored, by us and by all that we start."""
    usual = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with started(tmp_path, "time.sleep(600)") as process:
            await_child(tmp_path)
    finally:
        signal.signal(signal.SIGINT, usual)
    assert process.returncode == -signal.SIGTERM


def test_a_child_that_outlives_its_parent_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "LINGER_SECONDS", 1)
    with started(tmp_path, "sys.exit(3)") as process:
        await_child(tmp_path)
        assert process.wait() == 3
        assert len(members(process.pid)) == 1
    assert not members(process.pid)


def test_a_second_ctrl_c_ends_what_is_deaf_to_the_first(tmp_path, monkeypatch):
    def interrupted(process: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        monkeypatch.undo()
        raise KeyboardInterrupt

    deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    running = started(tmp_path, deaf)
    process = running.__enter__()
    await_child(tmp_path)
    monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        running.__exit__(None, None, None)
    assert not members(process.pid)
