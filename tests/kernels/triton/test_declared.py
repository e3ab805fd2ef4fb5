"""Kernels that declare shared memory get what the device has. Only a GPU's driver can refuse: here its calls count."""

import ctypes
from types import SimpleNamespace

import pytest

pytest.importorskip("triton", reason="the package triton is not installed")

from requant_kernels.dense_sparse.triton import declared

from tests.emulator.driver import SHARED_MEMORY, emulated

STATIC = 33792


@pytest.fixture
def asked(monkeypatch):
    """What is set, by attribute; ``status`` is what the driver answers."""
    found: dict[int, int] = {}

    def set_attribute(handle, attribute, value):
        assert handle.value == 77
        found[attribute] = value
        return driver.status

    def get_attribute(to, attribute, handle):
        assert (attribute, handle.value) == (declared.STATIC_BYTES, 77)
        to._obj.value = STATIC
        return 0

    driver = SimpleNamespace(status=0, cuFuncSetAttribute=set_attribute, cuFuncGetAttribute=get_attribute)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    with emulated(90):
        yield SimpleNamespace(found=found, driver=driver)


def test_a_kernel_with_a_buffer_may_have_all_that_is_left(asked):
    declared.ask(None, 77, "middle_kernel", None, "")
    assert asked.found[declared.MOST_DYNAMIC_BYTES] == SHARED_MEMORY["90"] - STATIC


def test_others_are_left_alone(asked):
    declared.ask(None, 77, "one_kernel", None, "")
    assert not asked.found


def test_a_refusal_names_the_kernel(asked):
    asked.driver.status = 1
    with pytest.raises(RuntimeError, match="more shared memory for decode_kernel: CUDA driver error 1"):
        declared.ask(None, 77, "decode_kernel", None, "")


def test_triton_asks_when_it_loads_a_kernel():
    import triton
    from requant_kernels.dense_sparse.triton import launch

    assert not launch.PTX or declared.ask in triton.knobs.runtime.kernel_load_end_hook.calls
