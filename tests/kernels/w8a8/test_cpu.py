"""Every CPU implementation that can run here computes what the reference does; those that would saturate refuse."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from requant_kernels import choice, reference
from requant_kernels.scheme import ActivationScheme
from requant_kernels.w8a8 import dispatch
from requant_kernels.w8a8.interface import LayerConfig
from requant_kernels.w8a8.rounding import round_input
from requant_kernels.w8a8.saturation import unavailable

from tests.kernels.strategies import random_w8a8, w8a8_layers

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CPU_IMPLEMENTATIONS = ("cpu_int8_avx512", "cpu_int8_avx2", "onednn", "int_mm", "fbgemm", "float32")


def runnable(name, weight, dtype=torch.float32):
    implementation, config = dispatch.IMPLEMENTATIONS[name], LayerConfig.of(weight, dtype, CPU)
    able, reason = implementation.can_implement(config)
    if not able:
        pytest.skip(f"{name}: {reason}")
    return implementation, config


def run(name, weight, x, bias=None):
    implementation, config = runnable(name, weight, x.dtype)
    prepared = implementation.prepare(weight, config)
    return implementation.apply(x, list(prepared.tensors.values()), bias, prepared.out_features, list(prepared.meta))


def inputs(weight, tokens, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, weight.in_features, generator=generator) * 2
    x[tokens // 2] = 0  # a token of zeros has no range
    return x.to(dtype), torch.randn(weight.out_features, generator=generator).to(dtype)


@pytest.mark.parametrize("name", CPU_IMPLEMENTATIONS)
@given(
    weight=w8a8_layers(),
    tokens=st.sampled_from((1, 2, 3, 17, 64, 65)),
    dtype=st.sampled_from(DTYPES),
    with_bias=st.booleans(),
)
def test_an_implementation_equals_the_reference(name, weight, tokens, dtype, with_bias):
    x, bias = inputs(weight, tokens, dtype)
    if not with_bias:
        bias = None
    y = run(name, weight, x, bias)
    assert y.dtype == dtype
    expected = reference.w8a8_linear(x.float(), reference_part(weight), bias)
    rounding = 2 * torch.finfo(dtype).eps * (expected.abs() + (0 if bias is None else bias.abs().float()))
    assert bool(
        ((y.float() - expected).abs() <= rounding + 4 * torch.finfo(torch.float32).eps * terms(x, weight)).all()
    )


def terms(x, weight):
    """The sum of the magnitudes of all that is added: what rounding in fp32 is relative to, whatever the order."""
    scheme = weight.scheme.activations
    codes, scale, zero_point = reference.quantize_input(x, scheme, weight.input_scale, weight.input_zero_point)
    magnitudes = (codes.float().abs() + zero_point.abs()) @ weight.codes.float().abs().T
    return magnitudes * scale * weight.scale.float()


def reference_part(weight):
    """The bias correction is the caller's affair: a bias like any other."""
    tensors = weight.to_tensors()
    tensors.pop("bias_correction", None)
    scheme = type(weight.scheme)(weight.scheme.weights, None, weight.scheme.activations)
    return type(weight).from_tensors(scheme, tensors, "layer")


@pytest.mark.parametrize("name", CPU_IMPLEMENTATIONS)
@pytest.mark.parametrize("tokens", [1, 8, 100])
def test_the_largest_codes_there_are_do_not_saturate(name, tokens):
    weight = random_w8a8(ActivationScheme(dynamic=False), (64, 1024), dtype=torch.float32)
    weight.codes.fill_(127)
    weight.codes[1::2] = -128
    x = torch.full((tokens, 1024), 1e3)
    x[:, ::3] = -1e3
    assert torch.allclose(run(name, weight, x), reference.w8a8_linear(x, weight), rtol=1e-6, atol=0)


@given(
    tokens=st.integers(1, 40),
    columns=st.integers(1, 200),
    dtype=st.sampled_from(DTYPES),
    scheme=st.builds(ActivationScheme, dynamic=st.booleans(), symmetric=st.booleans()),
    seed=st.integers(0, 999),
)
def test_inputs_are_rounded_bit_for_bit_as_defined(tokens, columns, dtype, scheme, seed):
    x = (torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)
    static = (None if scheme.dynamic else torch.tensor([0.02]), None if scheme.symmetric else torch.tensor([-30]))
    found, defined = round_input(x, scheme, *static), reference.quantize_input(x, scheme, *static)
    assert torch.equal(found.codes, defined.codes)
    assert torch.equal(found.scale.expand_as(defined.scale), defined.scale)


def test_a_product_that_saturates_is_recognised():
    def saturating(codes, weight):
        unsigned = codes.long() + 128
        pairs = unsigned[:, None, 0::2] * weight.long()[:, 0::2] + unsigned[:, None, 1::2] * weight.long()[:, 1::2]
        return pairs.clamp(-(1 << 15), (1 << 15) - 1).sum(-1) - 128 * weight.long().sum(1)

    assert "saturate" in unavailable(saturating)
    assert unavailable(lambda codes, weight: codes.long() @ weight.long().T) == ""


def test_a_product_that_this_pytorch_lacks_is_recognised():
    def absent(codes, weight):
        return torch.ops.aten.no_such_product(codes, weight)

    assert "does not offer it" in unavailable(absent)


WITHOUT_VNNI = {
    "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "ATEN_CPU_CAPABILITY": "avx2",
}
CHOOSE = """
import torch
try:
    import vllm._C_AVX2
except ImportError:
    pass  # it registers its operators and is no module, or vLLM is not installed
from requant_kernels import reference
from requant_kernels.scheme import ActivationScheme
from requant_kernels.w8a8 import dispatch
from requant_kernels.w8a8.interface import LayerConfig
from tests.kernels.strategies import random_w8a8

weight = random_w8a8(ActivationScheme(dynamic=True), (64, 512), dtype=torch.float32)
x = torch.randn(9, 512)
for name, one in dispatch.IMPLEMENTATIONS.items():
    config = LayerConfig.of(weight, torch.float32, torch.device("cpu"))
    able, reason = one.can_implement(config)
    if able:
        prepared = one.prepare(weight, config)
        y = one.apply(x, list(prepared.tensors.values()), None, 64, list(prepared.meta))
        torch.testing.assert_close(y, reference.w8a8_linear(x, weight), rtol=1e-5, atol=1e-5)
    print(name, able, reason)
"""


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in {"AVX2", "AVX512"}, reason="instruction sets of x86-64 processors"
)
def test_a_processor_without_vnni_gets_an_exact_product():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CHOOSE],
        env=os.environ | WITHOUT_VNNI | {"PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    able = dict(line.split()[:2] for line in done.stdout.splitlines())
    assert able["onednn"] == "False"
    # _int_mm saturates on some of them and is slow on the others: never before what is fast
    assert list(able).index("cpu_int8_avx2") < list(able).index("int_mm")
    assert able["fbgemm"] == able["float32"] == "True"


def test_the_kind_of_layer_and_the_choice_are_logged_once(caplog):
    weight = random_w8a8(ActivationScheme(dynamic=True), (8, 32))
    choice._log_once.cache_clear()
    with caplog.at_level("INFO", logger="requant_kernels"):
        for _ in range(2):
            prepared = dispatch.prepare(weight, torch.bfloat16, CPU)
    assert len(caplog.records) == 1
    assert f"W8A8 dynamic symmetric layers with torch.bfloat16 on cpu run as {prepared.implementation}" in caplog.text
