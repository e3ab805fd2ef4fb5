"""Packed weights on a CPU, multiplied by torch's operators and in C++: layouts are what we believe, all regimes say the
same, memory stays small."""

import os
import platform
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from requant_kernels import native, ops, reference
from requant_kernels.dense_sparse import cpu_bf16, cpu_int4, cpu_int4_native, int4_panels
from requant_kernels.dense_sparse.interface import LayerConfig
from requant_kernels.prepared import Prepared
from requant_kernels.scheme import LayerScheme, SparseScheme, WeightScheme
from requant_kernels.weight import DenseSparseWeight

from tests.kernels.strategies import random_weight

pytestmark = pytest.mark.skipif(bool(int4_panels.unavailable()), reason=int4_panels.unavailable())

SHAPE = (200, 256)


BUILT = {
    cpu_int4: cpu_int4.CpuInt4(),
    cpu_int4_native: cpu_int4_native.CpuInt4Native(),
    cpu_bf16: cpu_bf16.CpuBf16(),
}
IN_CPP = {cpu_int4_native: "cpu_int4_linear", cpu_bf16: "cpu_bf16_linear"}


def name(module) -> str:
    return BUILT[module].name


def usable(module):
    """Where an implementation is, if it can be had here."""
    if module.unavailable():
        pytest.skip(module.unavailable())
    return module


@pytest.fixture(scope="module")
def compiled() -> None:
    usable(cpu_int4_native)


@pytest.fixture(params=BUILT, ids=name)
def module(request):
    return usable(request.param)


@pytest.fixture(scope="module", params=IN_CPP, ids=name)
def native_module(request):
    return usable(request.param)


def prepare(module, weight: DenseSparseWeight) -> Prepared:
    config = LayerConfig.of(weight, torch.bfloat16, torch.device("cpu"))
    assert BUILT[module].can_implement(config) == (True, "")
    return BUILT[module].prepare(weight, config)


def scheme(bits: int, group_size: int, symmetric: bool) -> LayerScheme:
    return LayerScheme(WeightScheme(bits, group_size, symmetric), SparseScheme())


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group_size", [-1, 32, 64, 128, 256])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_regime_decodes_what_the_reference_does(module, bits, group_size, symmetric):
    weight = random_weight(scheme(bits, group_size, symmetric), SHAPE)
    prepared = prepare(module, weight)
    unit = torch.eye(SHAPE[1], dtype=torch.bfloat16)
    expected = reference.dequantize(weight).T
    # Off the grid of bf16 only by its own rounding, and by that of the 4-bit zero term.
    tolerance = {"rtol": 2**-7, "atol": 2**-7 * float(weight.scale.max()) * 8}
    for tokens in (1, 7, 16, 20, SHAPE[1]):
        y = torch.cat([ops.dense_sparse_linear(part, prepared) for part in unit.split(tokens)])
        torch.testing.assert_close(y.float(), expected, **tolerance)


@pytest.mark.parametrize("bits", [2, 3], ids=lambda bits: f"{bits} bit")
def test_narrow_codes_lose_nothing(module, bits):
    weight = random_weight(LayerScheme(WeightScheme(bits, 64, symmetric=False)), SHAPE)
    y = ops.dense_sparse_linear(torch.eye(SHAPE[1], dtype=torch.bfloat16), prepare(module, weight))
    assert torch.equal(y, reference.dequantize(weight).T.to(torch.bfloat16))


@pytest.mark.parametrize("block", [1, 256 * 64 * 2, 1 << 30], ids=["one panel", "two panels", "everything"])
def test_the_size_of_the_decoded_block_changes_nothing(block, monkeypatch):
    weight = random_weight(scheme(4, 64, False), SHAPE)
    x, prepared = torch.randn(100, SHAPE[1]).to(torch.bfloat16), prepare(cpu_int4, weight)
    usual = ops.dense_sparse_linear(x, prepared)
    monkeypatch.setattr(cpu_int4, "BLOCK_ELEMENTS", block)
    torch.testing.assert_close(ops.dense_sparse_linear(x, prepared), usual, rtol=2**-7, atol=1e-2)


def test_an_unknown_layout_is_left_to_the_operator():
    weight = random_weight(scheme(4, 64, True), SHAPE)
    known = prepare(cpu_int4, weight)
    unknown = Prepared(known.implementation, known.out_features, known.tensors, meta=(known.meta[0], 0))
    x = torch.randn(100, SHAPE[1]).to(torch.bfloat16)
    y, expected = (ops.dense_sparse_linear(x, one) for one in (unknown, known))
    torch.testing.assert_close(y, expected, rtol=2**-6, atol=2**-8 * float(expected.abs().max()))


@pytest.mark.parametrize("bits", [2, 3, 4], ids=lambda bits: f"{bits} bit")
def test_the_packed_layer_takes_little_more_than_its_bits(module, bits):
    weight = random_weight(scheme(bits, 64, False), (1024, 1024), density=0.005)
    stored = sum(t.numel() * t.element_size() for t in prepare(module, weight).tensors.values()) * 8 / 1024**2
    code, entry = (bits, 48) if module is cpu_bf16 else (4, 96)
    # and 32 bit a group of scale and zero
    assert stored < code + 32 / 64 + entry * 0.005 + 0.1


@given(
    bits=st.sampled_from((2, 3, 4)),
    shape=st.tuples(st.integers(1, 150), st.sampled_from((64, 128, 192, 1088, 2112))),  # 1024 are decoded at a time
    tokens=st.integers(1, 140),
    density=st.sampled_from((0.0, 0.003, 0.1, 1.0)),
    biased=st.booleans(),
    threads=st.integers(1, 3),
)
def test_in_one_operator_or_in_many_it_is_the_same(native_module, *, bits, shape, tokens, density, biased, threads):
    weight = random_weight(scheme(bits, 64, False), shape, density=density, seed=shape[0] + tokens)
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, shape[1], generator=generator).bfloat16()
    bias = torch.randn(shape[0], generator=generator).bfloat16() if biased else None
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    native, many = (ops.dense_sparse_linear(x, prepare(module, weight), bias) for module in (native_module, cpu_int4))
    torch.set_num_threads(before)
    size = x.float().abs() @ reference.dequantize(weight).abs().T
    assert ((native.float() - many.float()).abs() <= 2**-7 * size + 2**-7 * many.float().abs() + 1e-6).all()


def test_the_compiler_sees_one_operator_for_every_number_of_tokens(native_module):
    weight = random_weight(scheme(4, 64, False), SHAPE)
    prepared = prepare(native_module, weight)
    compiled = torch.compile(
        lambda x: ops.dense_sparse_linear(x, prepared), fullgraph=True, dynamic=True, backend="eager"
    )
    for tokens in (2, 9, 100):
        x = torch.randn(tokens, SHAPE[1]).to(torch.bfloat16)
        assert torch.equal(compiled(x), ops.dense_sparse_linear(x, prepared))


def test_the_operator_is_what_torch_expects(native_module):
    prepared = prepare(native_module, random_weight(scheme(4, 64, False), SHAPE))
    x, tensors = torch.randn(3, SHAPE[1]).to(torch.bfloat16), list(prepared.tensors.values())
    arguments = (x, tensors, None, SHAPE[0], *prepared.meta)
    torch.library.opcheck(getattr(torch.ops.requant, IN_CPP[native_module]).default, arguments)


NARROW = """
import torch
from requant_kernels import reference
from requant_kernels.dense_sparse import cpu_int4_native
from requant_kernels.dense_sparse.interface import LayerConfig
from tests.kernels.strategies import random_weight
from tests.kernels.test_cpu_packed import scheme
assert not cpu_int4_native.unavailable(), cpu_int4_native.unavailable()
weight = random_weight(scheme(4, 64, False), (200, 256))
config = LayerConfig.of(weight, torch.bfloat16, torch.device("cpu"))
layer = cpu_int4_native.CpuInt4Native()
prepared = layer.prepare(weight, config)
for tokens in (1, 3, 8, 40):
    x = torch.randn(tokens, 256).bfloat16()
    y = layer.apply(x, list(prepared.tensors.values()), None, 200, list(prepared.meta)).float()
    size = x.float().abs() @ reference.dequantize(weight).abs().T
    assert ((y - reference.dense_sparse_linear(x.float(), weight)).abs() <= 2**-7 * size).all()
print("panels of", prepared.meta[1])
"""


@pytest.mark.usefixtures("compiled")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="compiles for x86-64 with AVX2")
def test_narrower_vectors_say_the_same(tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\nexec "${REAL_CXX:-c++}" "$@" -march=haswell\n')
    compiler.chmod(0o755)
    settings = {"CXX": str(compiler), "XDG_CACHE_HOME": str(tmp_path), "ATEN_CPU_CAPABILITY": "avx2"}
    settings |= {"REAL_CXX": os.environ["CXX"]} if "CXX" in os.environ else {}
    done = subprocess.run(
        [sys.executable, "-c", NARROW], env=os.environ | settings, text=True, capture_output=True, check=False
    )
    assert done.stdout.strip() == "panels of 32", done.stderr


def test_a_bias_of_another_dtype_is_added_as_what_it_is(module):
    prepared, x = prepare(module, random_weight(scheme(4, 64, False), SHAPE)), torch.randn(3, SHAPE[1]).bfloat16()
    bias = torch.randn(SHAPE[0]).bfloat16()
    assert torch.equal(*(ops.dense_sparse_linear(x, prepared, one) for one in (bias, bias.float())))


def test_a_machine_without_a_compiler_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", f"{tmp_path}/nowhere -O2")  # as other builds take it: a command
    native.load.cache_clear()
    assert f"No such file or directory: '{tmp_path}/nowhere'" in native.load(cpu_int4_native.SOURCE)
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    native.load.cache_clear()
    assert native.load(cpu_int4_native.SOURCE) == "needs a C++ compiler, and there is none on the PATH"
    native.load.cache_clear()


def test_a_user_without_a_home_is_told_so(monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(native.Path, "home", home)
    native.load.cache_clear()
    assert native.load(cpu_int4_native.SOURCE) == "cpu_int4.cpp: Could not determine home directory."
    native.load.cache_clear()


@pytest.mark.usefixtures("compiled")
def test_a_source_that_does_not_compile_names_the_error(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "broken.cpp"
    source.write_text("int f() { return x; }")
    assert "fails on broken.cpp" in native.load(source)
    assert "error" in native.load(source)
    assert not list((tmp_path / "vllm-requant").iterdir())
