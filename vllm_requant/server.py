"""A ``vllm serve`` process of our own: started on a free loopback port, waited for, and always stopped."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# A CPU server refuses vLLM's default share of memory, and reserves a core that a small machine needs.
CPU_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
QUIET_ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
POLL_SECONDS = 0.5
STOP_SECONDS = 30.0


class ServerError(RuntimeError):
    """The server did not come up; the message says why, as far as its log does."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ends the whole process group: vLLM's engine and workers are children of the server."""
    for number in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(STOP_SECONDS)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def _cause(text: str) -> str:
    """The first error that a log names, the root one of vLLM's chain of processes; else its last lines."""
    first = re.search(r"^(?:\([^)]*\) )?(?:ERROR [^]]*\] )?([\w.]*(?:Error|Exception): .+)$", text, re.MULTILINE)
    return first[1] if first else "\n".join(text.splitlines()[-20:])


def _await_health(
    process: subprocess.Popen[bytes], url: str, log: Path, timeout: float, waiting: Callable[[float], None]
) -> None:
    started = time.monotonic()
    while not _healthy(url):
        elapsed = time.monotonic() - started
        if process.poll() is not None or elapsed > timeout:
            why = f"exited with {process.returncode}" if process.poll() is not None else f"silent for {timeout:.0f} s"
            raise ServerError(f"vllm serve {why} (log: {log})\n{_cause(log.read_text(errors='replace'))}")
        waiting(elapsed)
        time.sleep(POLL_SECONDS)


@contextmanager
def serve(
    model: Path,
    *arguments: str,
    log: Path,
    timeout: float = 900,
    environment: dict[str, str] | None = None,
    waiting: Callable[[float], None] = lambda elapsed: None,
) -> Iterator[str]:
    """Runs ``vllm serve MODEL ARGUMENTS`` and yields its base URL once /health answers.

    ``waiting`` is called with the seconds so far, about twice a second. The process group is stopped on any exit
    from the block, an exception or Ctrl-C included. Raises ServerError.
    """
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), *arguments]
    settings = QUIET_ENVIRONMENT | CPU_ENVIRONMENT | dict(os.environ) | (environment or {})
    with log.open("wb") as output:
        # a session of its own, so that Ctrl-C reaches us first and the whole group can be ended
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=settings, start_new_session=True
        )
        try:
            _await_health(process, url, log, timeout, waiting)
            yield url
        finally:
            _stop(process)
