"""A ``vllm serve`` process of our own: started on a free loopback port, waited for, and always stopped.

vLLM is run as a program, never imported: making checkpoints does not need it.
"""

import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from requant.processes import session

VLLM = (sys.executable, "-m", "vllm.entrypoints.cli.main")  # the command `vllm` of this environment
# A CPU server refuses vLLM's default share of memory, and reserves a core that a small machine needs.
CPU_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
QUIET_ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
POLL_SECONDS = 0.5
PORT_TAKEN = "Address already in use"


class ServerError(RuntimeError):
    """The server did not come up, died or failed a request; the message says why, as far as the log does."""


@dataclass(frozen=True)
class Server:
    """One that runs. ``session``: the number of its session, for requant.processes. ``startup_seconds``: until it was
    healthy."""

    url: str
    log: Path
    process: subprocess.Popen[bytes]
    startup_seconds: float

    @property
    def session(self) -> int:
        return self.process.pid

    def check(self) -> None:
        """Raises ServerError where it has ended."""
        if self.process.poll() is not None:
            raise ServerError(f"vllm serve died with exit code {self.process.returncode} {_told(self.log)}")


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


def cause(text: str) -> str:
    """The first error that a log names, the root one of vLLM's chain of processes; else its last lines."""
    first = re.search(r"^(?:\([^)]*\) )?(?:ERROR [^]]*\] )?([\w.]*(?:Error|Exception): .+)$", text, re.MULTILINE)
    return first[1] if first else "\n".join(text.splitlines()[-20:])


def _told(log: Path) -> str:
    return f"(log: {log})\n{cause(log.read_text(errors='replace'))}"


def _await_health(
    process: subprocess.Popen[bytes], url: str, log: Path, timeout: float, waiting: Callable[[float], None]
) -> float:
    """Seconds until the server was healthy. Raises ServerError."""
    started = time.monotonic()
    while True:
        elapsed = time.monotonic() - started
        if process.poll() is not None:
            if PORT_TAKEN in log.read_text(errors="replace"):
                raise ServerError(f"{url}: another program took the port just now; run this again")
            raise ServerError(f"vllm serve exited with {process.returncode} {_told(log)}")
        if _healthy(url):
            return elapsed
        if elapsed > timeout:
            raise ServerError(f"vllm serve silent for {timeout:.0f} s {_told(log)}")
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
) -> Iterator[Server]:
    """Runs ``vllm serve MODEL ARGUMENTS`` and yields the server once /health answers.

    ``waiting`` is called with the seconds so far, about twice a second. All its processes are stopped on any exit
    from the block, an exception or Ctrl-C included. Raises ServerError.
    """
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [*VLLM, "serve", str(model), "--host", "127.0.0.1", "--port", str(port), *arguments]
    settings = CPU_ENVIRONMENT | QUIET_ENVIRONMENT | dict(os.environ) | (environment or {})
    with session(command, log=log, environment=settings) as process:
        yield Server(url, log, process, _await_health(process, url, log, timeout, waiting))
