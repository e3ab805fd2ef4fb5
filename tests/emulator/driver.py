"""A driver for Triton whose GPU is tests/emulator/machine.py: kernels are compiled as for a real one, then emulated.

Tensors are those of the CPU. ``emulated`` makes it the active driver for a while.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from requant_kernels.aot import SHARED_MEMORY
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver
from triton.runtime.cache import get_cache_manager

from tests.emulator.machine import Code, Launch
from tests.emulator.memory import Fault, Global, Range
from tests.emulator.ptx import parse
from tests.emulator.traffic import Traffic

UNASKED = 48 * 1024  # bytes of shared memory that CUDA gives to a kernel; Triton asks where its own part is larger


@cache
def code(key: str, name: str) -> Code:
    """The kernel that Triton's cache holds under ``key``."""
    path = get_cache_manager(key).get_file(f"{name}.ptx")
    assert path, f"the compiler left no PTX of {name}"
    return Code(parse(Path(path).read_text()))


class Launcher:
    """Of one kernel; called as Triton calls its launchers."""

    def __init__(self, source: Any, metadata: Any):
        self._taken = [kind != "constexpr" for kind in source.signature.values()]
        self._code = code(metadata.hash, metadata.name)
        self._metadata = metadata

    def __call__(self, *arguments: Any) -> None:
        gpu = driver.active
        if not gpu.runs:
            return
        values = [v for v, taken in zip(arguments[-len(self._taken) :], self._taken, strict=True) if taken]
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        assert all(tensor.is_contiguous() for tensor in tensors)
        ranges = [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in tensors]
        memory = Global(ranges, gpu.written, gpu.traffic)
        numbers = [value.data_ptr() if isinstance(value, torch.Tensor) else int(value) for value in values]
        declared, most = sum(self._code.kernel.shared.values()), UNASKED - self._metadata.shared
        if 0 <= most < declared and not triton.knobs.runtime.kernel_load_end_hook.calls:
            raise Fault("more shared memory, declared and dynamic, than a kernel may have unless somebody asks for it")
        numbers += [0] * (len(self._code.kernel.parameters) - len(numbers))  # scratch memory, which none needs
        metadata = self._metadata
        pdl = bool(getattr(metadata, "launch_pdl", False))
        self._code.run(Launch(numbers, arguments[:3], metadata.num_warps, metadata.shared, pdl, gpu.order), memory)
        gpu.written += memory.written


class Emulated(DriverBase):  # type: ignore[misc]  # triton has no types
    """One GPU of the given compute capability (80, 90). ``order``: ``Launch.order`` of all launches; ``runs``: they are
    not only compiled; ``traffic`` counts their accesses; ``written``: by launches so far."""

    launcher_cls = Launcher

    def __init__(self, capability: int, order: int, runs: bool, traffic: Traffic | None):
        super().__init__()
        self.order, self.runs, self.traffic = order, runs, traffic
        self.written: list[Range] = []
        self._capability = capability
        self.utils = SimpleNamespace(
            load_binary=lambda name, binary, shared, device: (object(), None, 0, 0, 1024),
            unload_module=lambda module: None,
            get_device_properties=lambda device: {"max_shared_mem": SHARED_MEMORY[str(capability)]},
        )

    @staticmethod
    def is_active() -> bool:
        return False

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return self._capability  # Triton keeps a kernel's compilations by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("there is nothing to time")


@contextmanager
def emulated(capability: int, order: int = 0, runs: bool = True, traffic: Traffic | None = None) -> Iterator[None]:
    before = driver._active  # reading driver.active would look for a GPU
    driver.set_active(Emulated(capability, order, runs, traffic))
    try:
        yield
    finally:
        driver._active = before
