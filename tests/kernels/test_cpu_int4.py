"""The packed 4-bit path on a CPU: its layout is what we believe, both regimes say the same, memory stays small."""

import pytest
import torch
from requant_kernels import ops, reference
from requant_kernels.dense_sparse import cpu_int4, int4_panels
from requant_kernels.dense_sparse.interface import LayerConfig
from requant_kernels.prepared import Prepared
from requant_kernels.scheme import LayerScheme, SparseScheme, WeightScheme
from requant_kernels.weight import DenseSparseWeight

from tests.kernels.strategies import random_weight

pytestmark = pytest.mark.skipif(bool(int4_panels.unavailable()), reason=int4_panels.unavailable())

SHAPE = (200, 256)


def prepare(weight: DenseSparseWeight) -> Prepared:
    config = LayerConfig.of(weight, torch.bfloat16, torch.device("cpu"))
    implementation = cpu_int4.CpuInt4()
    assert implementation.can_implement(config) == (True, "")
    return implementation.prepare(weight, config)


def scheme(bits: int, group_size: int, symmetric: bool) -> LayerScheme:
    return LayerScheme(WeightScheme(bits, group_size, symmetric), SparseScheme())


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group_size", [-1, 32, 64, 128, 256])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_both_regimes_decode_what_the_reference_does(bits, group_size, symmetric, monkeypatch):
    weight = random_weight(scheme(bits, group_size, symmetric), SHAPE)
    prepared = prepare(weight)
    unit = torch.eye(SHAPE[1], dtype=torch.bfloat16)
    expected = reference.dequantize(weight).T
    # Off the grid of bf16 only by its own rounding, and by that of the 4-bit zero term.
    tolerance = {"rtol": 2**-7, "atol": 2**-7 * float(weight.scale.max()) * 8}
    for regime in (1, 1 << 30):
        monkeypatch.setattr(cpu_int4, "MANY_TOKENS", regime)
        torch.testing.assert_close(ops.dense_sparse_linear(unit, prepared).float(), expected, **tolerance)


@pytest.mark.parametrize("bits", [2, 3], ids=lambda bits: f"{bits} bit")
def test_narrow_codes_lose_nothing_in_the_4_bit_grid(bits):
    weight = random_weight(LayerScheme(WeightScheme(bits, 64, symmetric=False)), SHAPE)
    y = ops.dense_sparse_linear(torch.eye(SHAPE[1], dtype=torch.bfloat16), prepare(weight))
    assert torch.equal(y, reference.dequantize(weight).T.to(torch.bfloat16))


@pytest.mark.parametrize("block", [1, 256 * 64 * 2, 1 << 30], ids=["one panel", "two panels", "everything"])
def test_the_size_of_the_decoded_block_changes_nothing(block, monkeypatch):
    weight = random_weight(scheme(4, 64, False), SHAPE)
    x, prepared = torch.randn(100, SHAPE[1]).to(torch.bfloat16), prepare(weight)
    usual = ops.dense_sparse_linear(x, prepared)
    monkeypatch.setattr(cpu_int4, "BLOCK_ELEMENTS", block)
    torch.testing.assert_close(ops.dense_sparse_linear(x, prepared), usual, rtol=2**-7, atol=1e-2)


def test_an_unknown_layout_is_left_to_the_operator():
    weight = random_weight(scheme(4, 64, True), SHAPE)
    known = prepare(weight)
    unknown = Prepared(known.implementation, known.out_features, known.tensors, meta=(known.meta[0], 0))
    x = torch.randn(100, SHAPE[1]).to(torch.bfloat16)
    y, expected = (ops.dense_sparse_linear(x, one) for one in (unknown, known))
    torch.testing.assert_close(y, expected, rtol=2**-6, atol=2**-8 * float(expected.abs().max()))


def test_the_packed_layer_takes_little_more_than_its_bits():
    weight = random_weight(scheme(4, 64, False), (1024, 1024), density=0.005)
    stored = sum(t.numel() * t.element_size() for t in prepare(weight).tensors.values()) * 8 / 1024**2
    # 4 bit of codes, 32 bit a group of scale and zero, 96 bit an entry
    assert stored < 4 + 32 / 64 + 96 * 0.005 + 0.1
