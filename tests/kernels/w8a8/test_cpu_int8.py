"""The W8A8 layer as one C++ operator: its layout, its rounding to the bit, what torch.compile sees, threads."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from requant_kernels import ops, reference
from requant_kernels.prepared import Prepared
from requant_kernels.scheme import ActivationScheme
from requant_kernels.w8a8 import cpu_int8
from requant_kernels.w8a8.interface import LayerConfig
from requant_kernels.w8a8.weight import W8A8Weight

from tests.kernels.strategies import random_w8a8

SHAPE = (200, 256)
SCHEMES = [ActivationScheme(dynamic, symmetric) for dynamic in (True, False) for symmetric in (True, False)]
IDS = [f"{'dynamic' if one.dynamic else 'static'} {'symmetric' if one.symmetric else 'asymmetric'}" for one in SCHEMES]


MACHINES = (cpu_int8.AVX512, cpu_int8.AVX2)

Prepare = Callable[..., Prepared]


@pytest.fixture(params=MACHINES, ids=lambda machine: machine.name)
def prepare(request) -> Prepare:
    """For a machine that this processor can be."""
    if missing := request.param.unavailable():
        pytest.skip(missing)

    def made(weight: W8A8Weight, dtype: torch.dtype = torch.float32) -> Prepared:
        return cpu_int8.CpuInt8(request.param).prepare(weight, LayerConfig.of(weight, dtype, torch.device("cpu")))

    return made


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.name)
@given(rows=st.integers(1, 150), columns=st.integers(1, 70))
def test_every_code_lies_where_the_operator_reads_it(machine, rows, columns):
    codes = torch.randint(-128, 128, (rows, columns), dtype=torch.int8)
    layout, panel, block = machine.packed(codes), machine.panel, machine.block
    assert layout.shape == (-(-rows // panel), -(-columns // block), panel, block)
    n, k = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    found = layout[n // panel, k // block, n % panel, k % block].to(torch.int16)
    assert torch.equal(found - 128 * machine.offset, codes.to(torch.int16))
    assert torch.equal(machine.codes(layout, torch.arange(rows), columns), codes.to(torch.int16))


def test_the_largest_sums_do_not_saturate(prepare):
    weight = random_w8a8(ActivationScheme(dynamic=True), (33, 64), dtype=torch.float32)
    weight.codes.fill_(-128)
    weight.codes[::2] = 127
    weight.scale.fill_(1)
    x = torch.full((7, 64), -127.0)
    assert torch.equal(ops.w8a8_linear(x, prepare(weight)), x @ weight.codes.float().T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", SCHEMES, ids=IDS)
def test_inputs_are_rounded_to_the_bit_as_defined(prepare, scheme, dtype):
    unit = random_w8a8(scheme, (93, 93), dtype=torch.float32)
    unit.codes.copy_(torch.eye(93))
    unit.scale.fill_(1)
    x = torch.randn(64, 93) * 3
    x[0] = torch.arange(93) - 46.5  # halves, with a step of 1
    x[0, 0], x[1] = 127, -x[0]
    x = x.to(dtype)
    defined = reference.quantize_input(x, scheme, unit.input_scale, unit.input_zero_point)
    assert torch.equal(ops.w8a8_linear(x, prepare(unit, dtype)), defined.dequantize().to(dtype))


@pytest.mark.parametrize("scheme", SCHEMES, ids=IDS)
def test_what_is_not_a_number_is_not_hidden(prepare, scheme):
    weight = random_w8a8(scheme, SHAPE, dtype=torch.float32)
    x = torch.randn(3, SHAPE[1])
    x[1, 7] = float("nan")
    y = ops.w8a8_linear(x, prepare(weight))
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("tokens", [1, 7, 97, 200])
def test_threads_change_nothing(prepare, tokens):
    weight = random_w8a8(ActivationScheme(dynamic=True, symmetric=False), SHAPE)
    x, prepared, threads = torch.randn(tokens, SHAPE[1]).bfloat16(), prepare(weight), torch.get_num_threads()
    found = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append(ops.w8a8_linear(x, prepared))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_a_token_is_the_same_among_any_others(prepare):
    weight = random_w8a8(ActivationScheme(dynamic=True), SHAPE)
    x, prepared = torch.randn(150, SHAPE[1]).bfloat16(), prepare(weight)
    together = ops.w8a8_linear(x, prepared)
    assert torch.equal(torch.cat([ops.w8a8_linear(one, prepared) for one in x.split(1)]), together)


def test_a_bias_of_another_dtype_is_added_as_what_it_is(prepare):
    prepared = prepare(random_w8a8(ActivationScheme(dynamic=True), SHAPE))
    x, bias = torch.randn(3, SHAPE[1]).bfloat16(), torch.randn(SHAPE[0]).bfloat16()
    assert torch.equal(*(ops.w8a8_linear(x, prepared, one) for one in (bias, bias.float())))


def test_the_compiler_sees_one_operator_for_every_number_of_tokens(prepare):
    prepared = prepare(random_w8a8(ActivationScheme(dynamic=True), SHAPE))
    compiled = torch.compile(lambda x: ops.w8a8_linear(x, prepared), fullgraph=True, dynamic=True, backend="eager")
    for tokens in (2, 9, 100):
        x = torch.randn(tokens, SHAPE[1])
        assert torch.equal(compiled(x), ops.w8a8_linear(x, prepared))


@pytest.mark.parametrize("scheme", SCHEMES, ids=IDS)
def test_the_operator_is_what_torch_expects(prepare, scheme):
    prepared = prepare(random_w8a8(scheme, SHAPE))
    arguments = (torch.randn(3, SHAPE[1]), list(prepared.tensors.values()), None, SHAPE[0], *map(bool, prepared.meta))
    torch.library.opcheck(getattr(torch.ops.requant, f"{prepared.implementation}_linear").default, arguments)


def test_other_dtypes_are_refused(prepare):
    prepared = prepare(random_w8a8(ActivationScheme(dynamic=True), SHAPE))
    with pytest.raises(RuntimeError, match="x is Double, not float32, bfloat16 or float16"):
        ops.w8a8_linear(torch.randn(3, SHAPE[1]).double(), prepared)


def test_the_benchmark_of_cpu_products_runs():
    script = Path(__file__).parents[3] / "benchmarks" / "cpu_kernels.py"
    options = ("--shapes", "4096x512", "--tokens", "1", "--seconds", "0")
    done = subprocess.run([sys.executable, script, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    columns = done.stdout.splitlines()[0].split(" | ")
    assert all(len(line.split(" | ")) == len(columns) for line in done.stdout.splitlines())
    assert sum("4096 x 512" in line for line in done.stdout.splitlines()) == 1
