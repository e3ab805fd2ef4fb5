"""What the compiler makes of the shipped W8A8 tiles, emulated (tests/emulator)."""

from dataclasses import dataclass

import pytest
import torch
from requant_kernels.w8a8.triton.table import Table, tables

from tests.emulator.driver import emulated
from tests.kernels.w8a8.cases import Case, check, check_rounding


@dataclass(frozen=True)
class Shipped(Case):
    dtype: torch.dtype = torch.bfloat16

    def table(self) -> Table:
        return tables()["default"]


GRID = {
    "one token": Shipped(1, 70, 384),
    "16 tokens, static asymmetric, float16": Shipped(16, 31, 300, False, symmetric=False, dtype=torch.float16),
    "40 tokens": Shipped(40, 100, 512),
    "70 tokens, asymmetric, tail": Shipped(70, 150, 333, symmetric=False, dtype=torch.float16),
    "130 tokens": Shipped(130, 140, 256),
    "260 tokens, static": Shipped(260, 130, 130, dynamic=False, bias=False),
}


pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("case", GRID.values(), ids=GRID.keys())
def test_compiled(case, capability):
    with emulated(capability):
        check(case)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_compiled_rounding_is_bit_for_bit_as_defined(symmetric):
    with emulated(90):
        check_rounding(Shipped(9, 1, 201, symmetric=symmetric))
