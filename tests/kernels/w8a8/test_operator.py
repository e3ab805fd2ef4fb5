"""``requant::w8a8_linear`` is one node for torch.compile, and takes inputs of any shape."""

import torch
from requant_kernels import ops, reference
from requant_kernels.scheme import ActivationScheme
from requant_kernels.w8a8 import dispatch

from tests.kernels.strategies import random_w8a8

CPU = torch.device("cpu")
WEIGHT = random_w8a8(ActivationScheme(dynamic=True), (40, 128), dtype=torch.float32)
PREPARED = dispatch.prepare(WEIGHT, torch.float32, CPU)


def test_leading_dimensions_and_strides_are_the_callers_affair():
    x = torch.randn(128, 3, 2).permute(2, 1, 0)
    y = ops.w8a8_linear(x, PREPARED)
    assert y.shape == (2, 3, 40)
    torch.testing.assert_close(y, reference.w8a8_linear(x, WEIGHT))


def test_no_token_is_an_empty_result():
    assert ops.w8a8_linear(torch.empty(0, 128), PREPARED).shape == (0, 40)


def test_it_is_registered_as_torch_expects():
    arguments = (torch.randn(3, 128), list(PREPARED.tensors.values()), torch.randn(40))
    torch.library.opcheck(
        torch.ops.requant.w8a8_linear.default,
        (*arguments, PREPARED.implementation, PREPARED.out_features, list(PREPARED.meta)),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_it_compiles_as_one_graph():
    compiled = torch.compile(lambda x: ops.w8a8_linear(x, PREPARED) + 1, fullgraph=True, backend="eager")
    x = torch.randn(5, 128)
    torch.testing.assert_close(compiled(x), reference.w8a8_linear(x, WEIGHT) + 1)
