"""The plugin is found, costs little, changes nothing for other models, and says which vLLM it knows."""

import subprocess
import sys
from importlib.metadata import entry_points

import pytest
from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config

import vllm_requant
from vllm_requant.config import RequantConfig
from vllm_requant.versions import check_version


def test_vllm_finds_the_entry_point():
    [entry] = entry_points(group="vllm.general_plugins", name="requant")
    assert entry.load() is vllm_requant.register


def test_registering_twice_is_registering_once():
    vllm_requant.register()
    vllm_requant.register()
    assert QUANTIZATION_METHODS.count("requant") == 1
    assert get_quantization_config("requant") is RequantConfig


def test_registering_imports_nothing_heavy():
    script = (
        "import sys, vllm.model_executor.layers.quantization\n"
        "before = set(sys.modules)\n"
        "import vllm_requant; vllm_requant.register()\n"
        "print(*(set(sys.modules) - before))"
    )
    out = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    heavy = {name for name in out.split() if name.split(".")[0] not in ("vllm_requant", "requant_kernels", "packaging")}
    assert not heavy


@pytest.mark.parametrize("version", ["0.30.0", "0.32.0+cpu", "0.32.3.dev1+g123", "0.33.0"])
def test_a_tested_vllm_is_accepted(version):
    check_version(version)


@pytest.mark.parametrize("version", ["0.29.2", "0.34.0", "1.0", "dev"])
def test_another_vllm_is_refused_in_one_line(version):
    with pytest.raises(
        RuntimeError, match=rf"^vllm-requant is tested with vLLM .* and refuses vLLM {version}"
    ) as refusal:
        check_version(version)
    assert "\n" not in str(refusal.value)
