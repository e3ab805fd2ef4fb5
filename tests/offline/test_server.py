"""Our own server processes: none is left behind, and one that can not start says why."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from requant.server import ServerError, cause, serve

SERVE_UNTIL_INTERRUPTED = """
import pathlib, sys
from requant.server import serve
model, log = map(pathlib.Path, sys.argv[1:])
with serve(model, log=log, waiting=lambda elapsed: print(elapsed, flush=True)):
    print("up", flush=True)
    sys.stdin.read()
"""


def servers_of(log: Path) -> list[int]:
    """Processes that write to ``log``: the server and its children."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(os.path.samefile(fd, log) for fd in (process / "fd").glob("[12]")):
                found.append(int(process.name))
        except OSError:  # it has just ended
            continue
    return found


@pytest.mark.server
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="finds processes through /proc")
def test_ctrl_c_leaves_no_process(micro_llama, tmp_path, ctrl_c):
    log = tmp_path / "server.log"
    command = [sys.executable, "-c", SERVE_UNTIL_INTERRUPTED, micro_llama, log]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as user:
        user.stdout.readline()  # the first "waiting"
        while not (log.exists() and log.stat().st_size):  # vLLM itself runs
            time.sleep(0.1)
        assert servers_of(log)
        user.send_signal(signal.SIGINT)
        _, errors = user.communicate()
    assert b"KeyboardInterrupt" in errors
    assert not servers_of(log)


@pytest.mark.server
def test_a_model_that_is_not_there_is_the_message(tmp_path):
    with pytest.raises(ServerError, match="vllm serve exited with 1"), serve(tmp_path, log=tmp_path / "server.log"):
        pass


def test_the_first_error_of_a_log_is_thecause():
    log = """(APIServer pid=1) WARNING this can cause failures like `OSError: [Errno 24]`
(EngineCore pid=2) ERROR 11-22 03:04:05 [core.py:9] EngineCore failed to start.
(EngineCore pid=2) ERROR 11-22 03:04:05 [core.py:9] requant_kernels.errors.CheckpointError: layer.tensor: missing
(APIServer pid=1) RuntimeError: Engine core initialization failed."""
    assert cause(log) == "requant_kernels.errors.CheckpointError: layer.tensor: missing"
