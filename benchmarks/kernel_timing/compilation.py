"""Compiles in parallel what a run will need: Triton's cache on disk is shared by processes, its compiler is not."""

import math
import os
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from queue import SimpleQueue

import torch

from benchmarks.kernel_timing.recording import reason, usable

Task = Callable[[], object]  # picklable; launches on the device what is to be compiled
MOST_WORKERS = 14
WORKER_BYTES = 6 * 2**30  # of the device's memory: a context, and the largest layer while it is made
LATE = "the time was used up"


def workers(device: torch.device) -> int:
    """How many processes the processors and the device's free memory allow."""
    torch.cuda.empty_cache()  # what this process keeps for later is theirs now
    free, _ = torch.cuda.mem_get_info(device)
    return max(1, min(MOST_WORKERS, (os.cpu_count() or 2) - 2, free // WORKER_BYTES))


def attempt(task: Task, device: torch.device, seconds: float) -> tuple[str, bool]:
    """In a worker: (what went wrong, "" for nothing; whether the worker can go on). Past ``seconds`` the worker dies,
    wherever the compiler may be."""
    signal.alarm(math.ceil(seconds))
    try:
        task()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception as error:  # what does not run on this device is an answer, not a failure
        return reason(error), usable(device)
    finally:
        signal.alarm(0)
    return "", True


def compile_all(tasks: Sequence[Task], count: int, device: torch.device, seconds: float) -> list[str]:
    """What went wrong with each task, "" for nothing, by ``count`` workers within about ``seconds``. A worker has a
    pool of its own: whoever dies, or loses the device, takes no other task along, and is replaced."""
    deadline = time.monotonic() + seconds
    idle: SimpleQueue[ProcessPoolExecutor] = SimpleQueue()

    def start() -> None:
        idle.put(ProcessPoolExecutor(1, get_context("spawn")))

    def result(task: Task) -> str:
        left = deadline - time.monotonic()
        if left <= 0:
            return LATE
        worker = idle.get()
        try:
            failure, alive = worker.submit(attempt, task, device, left).result()
        except BrokenProcessPool:
            failure, alive = LATE if time.monotonic() >= deadline else "its process died", False
        except Exception as error:  # a task that can not be sent
            failure, alive = reason(error), True
        if alive:
            idle.put(worker)
        else:
            worker.shutdown()
            start()
        return failure

    for _ in range(count):
        start()
    with ThreadPoolExecutor(count) as threads:
        failures = list(threads.map(result, tasks))
    for _ in range(count):
        idle.get().shutdown()
    return failures
