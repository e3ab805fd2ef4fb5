"""Shared memory that kernels declare themselves (patch.py), beside what Triton allots them at launch.

Without being asked, CUDA lets a kernel have 48 KiB of both together. Triton asks for more only where its own part alone
exceeds that. So we ask, whenever such a kernel is loaded, for all that the device has.
"""

import ctypes
from typing import Any

import triton
from triton.runtime import driver

DECLARING = ("middle_kernel", "decode_kernel")
STATIC_BYTES, MOST_DYNAMIC_BYTES, CARVEOUT = 1, 8, 9  # CUfunction_attribute


def _checked(status: int, what: str) -> None:
    if status:
        raise RuntimeError(f"{what}: CUDA driver error {status}")


def ask(module: Any, function: int | None, name: str, group: Any, key: str) -> None:
    """Triton's hook behind loading a kernel. Raises RuntimeError where the driver refuses."""
    if name not in DECLARING or not function:
        return
    cuda, static = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
    handle = ctypes.c_void_p(function)
    _checked(cuda.cuFuncGetAttribute(ctypes.byref(static), STATIC_BYTES, handle), f"shared memory of {name}")
    most = driver.active.utils.get_device_properties(driver.active.get_current_device())["max_shared_mem"]
    for attribute, value in ((MOST_DYNAMIC_BYTES, most - static.value), (CARVEOUT, 100)):
        _checked(cuda.cuFuncSetAttribute(handle, attribute, value), f"more shared memory for {name}")


def always_ask() -> None:
    triton.knobs.runtime.kernel_load_end_hook.add(ask)
