"""The built wheel works without the checkout: packages, entry points, data files, commands."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

CHECK = """
import importlib.metadata, importlib.resources, pathlib, sys
import requant, requant_kernels, vllm_requant
here = pathlib.Path(sys.argv[1])
for package in (requant, requant_kernels, vllm_requant):
    assert pathlib.Path(package.__file__).is_relative_to(here), package.__file__
[distribution] = importlib.metadata.distributions(name="vllm-requant", path=[str(here)])
names = {(point.group, point.name): point.value for point in distribution.entry_points}
assert names[("vllm.general_plugins", "requant")] == "vllm_requant:register"
data = importlib.resources.files("requant") / "data" / "austen.txt"
assert data.read_text().startswith("EMMA")
from requant_kernels.dense_sparse.cpu_int4_native import SOURCE
assert SOURCE.exists()
from requant_kernels.w8a8.cpu_int8 import AVX2, AVX512
assert all(one.source.exists() and list(one.source.parent.glob("*.h")) for one in (AVX2, AVX512))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The wheel, built from this checkout and unpacked where nothing else is."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-deps", "--no-build-isolation"]
    source = folder / "source"
    # a copy, so that no build folder is left in the checkout and nothing untracked slips into the wheel
    subprocess.run(["git", "clone", "--quiet", "--depth", "1", f"file://{ROOT}", source], check=True)
    subprocess.run([*pip, "--wheel-dir", folder, source], check=True, capture_output=True)
    [wheel] = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def run(site: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(site)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, text=True, capture_output=True, check=False
    )


def test_packages_entry_points_and_data_are_in_the_wheel(site, tmp_path):
    done = run(site, "-c", CHECK, str(site), cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_model_is_quantized_outside_the_checkout(site, tmp_path, micro_llama):
    module = ("-m", "requant.cli")
    done = run(site, *module, "quantize", str(micro_llama), "-o", "out", "--bits", "4", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = run(site, *module, "check", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_bench_is_a_command_of_the_wheel(site, tmp_path):
    done = run(site, "-m", "requant.cli", "bench", "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--against" in done.stdout
