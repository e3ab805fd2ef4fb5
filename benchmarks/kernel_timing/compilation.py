"""Compiles in parallel what a run will need: Triton's cache on disk is shared by processes, its compiler is not."""

import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import torch
from requant_kernels.dense_sparse.triton.implementation import Triton
from requant_kernels.dense_sparse.triton.table import Table

from benchmarks.kernel_timing import layers
from benchmarks.kernel_timing.layers import Setting
from benchmarks.kernel_timing.shapes import Shape


@dataclass(frozen=True)
class Job:
    """A layer that is to run at all ``tokens`` with ``table`` (None: the device's own)."""

    shape: Shape
    bits: int
    group: int
    density: float
    tokens: tuple[int, ...]
    table: Table | None = None


def run(job: Job, setting: Setting) -> str:
    """Runs the layer once at each number of tokens; returns what went wrong, "" for nothing."""
    implementation = Triton(job.table)
    try:
        weight = layers.random_weight(job.shape, job.bits, job.group, job.density, setting)
        prepared = layers.prepare(implementation, weight, setting)
        for tokens in job.tokens:
            x = layers.activations(tokens, job.shape, setting)
            implementation.apply(x, list(prepared.tensors.values()), None, prepared.out_features, list(prepared.meta))
        if setting.device.type == "cuda":
            torch.cuda.synchronize()
    except Exception as error:  # a candidate that does not run on this device is an answer, not a failure
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


def compile_all(jobs: Iterable[Job], setting: Setting) -> list[str]:
    """What went wrong with each job."""
    workers = max(1, min(14, (os.cpu_count() or 2) - 2))
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        return list(pool.map(run, (jobs := list(jobs)), [setting] * len(jobs)))
