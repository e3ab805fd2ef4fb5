"""A program in a session of its own: ended together with all its children, their memory added up."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

STOP_SECONDS = 30.0  # for the program to end by itself
LINGER_SECONDS = 5.0  # for its children after it; multiprocessing's resource tracker cleans up then
PROC = Path("/proc")


def leave(number: int, frame: FrameType | None) -> NoReturn:
    """A handler for SIGTERM: out of all blocks, so that what they have begun is ended; the exit code is a shell's."""
    sys.exit(128 + number)


@contextmanager
def session(command: Sequence[str], *, log: Path, environment: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Runs ``command`` with stdout and stderr in ``log``; it and its children are ended on any exit from the block.

    The session is its own, so that Ctrl-C in a terminal reaches us first, and its number is the program's pid.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=dict(environment), start_new_session=True
        )
    try:
        yield process
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGTERM)  # what a shell runs in the background is deaf to SIGINT
        process.wait(STOP_SECONDS)
        _await_end(process.pid)
    except (ProcessLookupError, subprocess.TimeoutExpired):
        pass
    finally:  # also when a second Ctrl-C interrupts the wait
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        _await_end(process.pid)


def _await_end(number: int) -> None:
    deadline = time.monotonic() + LINGER_SECONDS
    while members(number) and time.monotonic() < deadline:
        time.sleep(0.05)


def members(number: int) -> list[Path]:
    """The folders in /proc of the living processes of a session; none where there is no /proc."""
    found = []
    for folder in PROC.glob("[0-9]*"):
        with suppress(OSError):  # it has just ended
            # the name, in parentheses, may hold anything; then state, parent, group, session
            state, _, _, owner = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(owner) == number and state != "Z":
                found.append(folder)
    return found


def resident_bytes(number: int) -> int:
    """What the processes of a session hold in memory now; pages that they share count in each."""
    return _sum(number, "VmRSS")


def peak_resident_bytes(number: int) -> int:
    """The largest that each living process of a session ever held, added up: no less than their joint peak."""
    return _sum(number, "VmHWM")


def _sum(number: int, figure: str) -> int:
    total = 0
    for folder in members(number):
        with suppress(OSError):
            lines = (folder / "status").read_text().splitlines()
            total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{figure}:"))  # kB
    return total
