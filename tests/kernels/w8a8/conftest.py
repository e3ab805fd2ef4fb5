"""vLLM's CPU operators, which the package uses where a process has them, are loaded where vLLM is installed."""

import contextlib

with contextlib.suppress(ImportError):
    from vllm.platforms import current_platform

    current_platform.import_kernels()

from tests.kernels.triton.conftest import interpreted, poisoned

__all__ = ["interpreted", "poisoned"]
