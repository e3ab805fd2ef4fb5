"""The interpreter of Triton in a process of its own: TRITON_INTERPRET must be set before triton is imported, must not
reach other tests, and an access out of bounds ends the process."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

import pytest
import torch


def poison_new_tensors() -> None:
    """From here on, memory that a kernel has not written reads as NaN, of integers as 77."""
    unpoisoned = torch.Tensor.new_empty

    def new_empty(self: torch.Tensor, *size: Any, **options: Any) -> torch.Tensor:
        tensor = unpoisoned(self, *size, **options)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 77)

    torch.Tensor.new_empty = new_empty  # type: ignore[method-assign]


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """For as long as a test of this process runs."""
    monkeypatch.setattr(torch.Tensor, "new_empty", torch.Tensor.new_empty)
    poison_new_tensors()


def _start() -> None:
    import tests.kernels.triton.interpreter_bf16

    assert tests.kernels.triton.interpreter_bf16
    torch.set_num_threads(1)
    poison_new_tensors()


class Interpreter:
    """Calls functions in the interpreting process."""

    def __init__(self) -> None:
        self._pool = self._new()

    def _new(self) -> ProcessPoolExecutor:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(os.environ, "TRITON_INTERPRET", "1")
            pool = ProcessPoolExecutor(1, get_context("spawn"), _start)
            pool.submit(os.getpid).result()  # the process starts now, while the variable is set
        return pool

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return self._pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            self._pool = self._new()
            pytest.fail(f"the interpreter died on {arguments}: an access out of bounds")

    def close(self) -> None:
        self._pool.shutdown()


@pytest.fixture(scope="session")
def interpreted() -> Iterator[Interpreter]:
    pytest.importorskip("triton", reason="the package triton is not installed")
    interpreter = Interpreter()
    yield interpreter
    interpreter.close()
