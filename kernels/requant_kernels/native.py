"""C++ operators for CPUs: compiled once on the machine where they run, by its own compiler, as inductor does it."""

import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch

_LOG = logging.getLogger(__name__)
_TORCH = Path(torch.__file__).parent
_FLAGS = ("-std=c++20", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared")


@cache
def load(source: Path) -> str:
    """Makes the operators of the C++ file ``source`` known to torch; returns why that is impossible, or nothing."""
    found = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    compiler = os.environ.get("CXX") or (found and shlex.quote(found))  # a command, with arguments or without
    if not compiler:
        return "needs a C++ compiler, and there is none on the PATH"
    try:
        library = _folder() / f"{source.stem}-{_key(source, compiler)}.so"
        if not library.exists():
            _compile(compiler, source, library)
        torch.ops.load_library(library)  # type: ignore[no-untyped-call]
    except subprocess.CalledProcessError as error:
        first = next((line for line in error.stderr.splitlines() if "error" in line), error.stderr.strip()[-200:])
        return f"{compiler} fails on {source.name} ({first})"
    except (OSError, RuntimeError) as error:  # a folder that can not be written, or none at all
        return f"{source.name}: {error}"
    return ""


@cache
def load_linear(source: Path, operator: str) -> str:
    """The same for a file whose ``operator`` (x, weights, bias, out_features, …) torch.compile is to see as a layer."""
    missing = load(source)
    if not missing:
        torch.library.register_fake(operator, _fake)
    return missing


def _fake(
    x: torch.Tensor, weights: list[torch.Tensor], bias: torch.Tensor | None, out_features: int, *_: Any
) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm-requant"


def _key(source: Path, compiler: str) -> str:
    """Of all that decides whether a compiled library fits: source, headers beside it, flags, compiler, torch, and the
    processor."""
    files = (source, *sorted(source.parent.glob("*.h")))
    parts = (
        *(file.read_bytes() for file in files),
        *(text.encode() for text in (*_FLAGS, compiler, torch.__version__, _processor())),
    )
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _processor() -> str:
    """What it can do, as Linux says it; elsewhere only its kind."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


def _compile(compiler: str, source: Path, library: Path) -> None:
    """Appears complete or not at all; two processes may do the same work, which hurts neither."""
    library.parent.mkdir(parents=True, exist_ok=True)
    _LOG.info("compiling %s, once for this machine (some 20 seconds)", source.name)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        includes = [f"-I{_TORCH / 'include'}", f"-I{_TORCH / 'include' / 'torch' / 'csrc' / 'api' / 'include'}"]
        abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
        linked = [f"-L{_TORCH / 'lib'}", "-ltorch_cpu", "-lc10"]  # loaded already, so no search path is needed
        command = [*shlex.split(compiler), *_FLAGS, abi, *includes, str(source), "-o", str(made), *linked]
        subprocess.run(command, check=True, capture_output=True, text=True)
        os.replace(made, library)
    _LOG.info("compiled %s in %.0f s", source.name, time.monotonic() - started)
