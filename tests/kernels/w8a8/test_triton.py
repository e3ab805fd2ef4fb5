"""The Triton kernels against the reference: interpreted everywhere, and the same grid on a GPU where there is one."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from requant_kernels.w8a8.triton.implementation import Triton
from requant_kernels.w8a8.triton.table import Table, Tile, parse, tables

from tests.kernels.w8a8.cases import FUSED, PRODUCT, Case, check, check_rounding

GRID = {
    "one token": Case(1, 40, 192),
    "one token, split columns": Case(1, 33, 300, split=True),
    "16 tokens asymmetric": Case(16, 31, 70, symmetric=False),
    "3 tokens static": Case(3, 64, 128, dynamic=False),
    "5 tokens static asymmetric, split": Case(5, 17, 333, dynamic=False, symmetric=False, split=True),
    "float16 without bias": Case(4, 20, 65, bias=False, dtype=torch.float16),
    "bfloat16": Case(7, 50, 96, dtype=torch.bfloat16),
    "one column": Case(2, 1, 1),
    "fused beyond its tokens": Case(17, 40, 64),
    "product": Case(40, 100, 256, product=True),
    "product, one token": Case(1, 33, 64, product=True),
    "product with tails": Case(65, 70, 333, product=True),
    "product asymmetric, split": Case(33, 31, 500, symmetric=False, product=True, split=True),
    "product static asymmetric": Case(64, 64, 128, dynamic=False, symmetric=False, product=True),
    "product bfloat16 without bias": Case(20, 129, 64, bias=False, product=True, dtype=torch.bfloat16),
    "257 tokens": Case(257, 40, 64, product=True),
}


@pytest.mark.parametrize("case", GRID.values(), ids=GRID.keys())
def test_interpreted(interpreted, case):
    interpreted(check, case)


@given(
    case=st.builds(
        Case,
        tokens=st.integers(1, 257),
        rows=st.integers(1, 100),
        columns=st.integers(1, 300),
        dynamic=st.booleans(),
        symmetric=st.booleans(),
        bias=st.booleans(),
        product=st.booleans(),
        split=st.booleans(),
        dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
    )
)
@settings(max_examples=15)
def test_any_case_interpreted(interpreted, case):
    interpreted(check, case)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rounding_is_bit_for_bit_as_defined(interpreted, dynamic, symmetric, dtype):
    interpreted(check_rounding, Case(9, 1, 201, dynamic=dynamic, symmetric=symmetric, dtype=dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("case", GRID.values(), ids=GRID.keys())
def test_on_a_gpu(case):
    check(replace(case, device="cuda"))


def test_every_shipped_table_covers_every_number_of_tokens():
    for table in tables().values():
        for tokens in (1, 8, 9, 16, 17, 64, 65, 300, 5000, 100_000):
            tile = table.tile(tokens)
            assert tile.up_to is None or tokens <= tile.up_to
            assert tile.splits(tokens, 4096, 4096) >= 1


def test_warming_up_reaches_every_way_of_running():
    table = tables()["default"]
    for rows, columns in ((4096, 4096), (1024, 4096), (128, 14336)):
        ways = {(table.tile(t), table.tile(t).splits(t, rows, columns) > 1) for t in range(1, 4000)}
        warmed = {(table.tile(t), table.tile(t).splits(t, rows, columns) > 1) for t in table.regimes(rows, columns)}
        assert warmed == ways


@pytest.mark.parametrize("programs", [1, 7, 64, 1000])
def test_no_program_is_without_columns(programs):
    tile = replace(FUSED, programs=programs)
    for columns in (1, 63, 64, 65, 1000, 4096):
        splits = tile.splits(3, 64, columns)
        steps = -(-columns // tile.columns)
        share = -(-steps // splits)
        assert (splits - 1) * share < steps


BAD_TABLES = {
    "kernel 'middle' is not": {"tiles": [PRODUCT.__dict__ | {"kernel": "middle"}]},
    "do not hold up_to 32": {"tiles": [FUSED.__dict__ | {"up_to": 32}, PRODUCT.__dict__]},
    "programs 5000 are more than 4096": {"tiles": [PRODUCT.__dict__ | {"programs": 5000}]},
    "last tile must take any": {"tiles": [PRODUCT.__dict__ | {"up_to": 32}]},
}


@pytest.mark.parametrize(("message", "change"), BAD_TABLES.items(), ids=BAD_TABLES)
def test_a_table_that_can_not_work_is_refused(message, change):
    good = {"names": [], "source": "", "round_block": 64, "round_warps": 4, "tiles": [PRODUCT.__dict__]}
    assert isinstance(parse(good), Table)
    with pytest.raises(ValueError, match=message):
        parse(good | change)


def test_it_is_refused_without_a_cuda_device():
    from requant_kernels.scheme import ActivationScheme
    from requant_kernels.w8a8.interface import LayerConfig

    config = LayerConfig(ActivationScheme(dynamic=True), 8, 8, torch.bfloat16, torch.device("cpu"))
    assert Triton().can_implement(config) == (False, "runs on CUDA devices, not on cpu")
    assert isinstance(tables()["default"].tiles[0], Tile)
