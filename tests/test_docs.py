"""What docs/FORMAT.md shows is what the code does."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from requant_kernels.packing import pack
from requant_kernels.reference import dequantize, quantize_input
from requant_kernels.scheme import ActivationScheme, LayerScheme, SparseScheme, WeightScheme
from requant_kernels.sparse import SparsePart
from requant_kernels.weight import DenseSparseWeight, tensor_names

FORMAT = (Path(__file__).parent.parent / "docs" / "FORMAT.md").read_text()


def to_hex(tensor: torch.Tensor) -> str:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes().hex(" ")


def counting_codes(bits: int) -> torch.Tensor:
    return (torch.arange(32) % (1 << bits))[None]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_bit_order_table(bits):
    words, stored = re.search(rf"^\| {bits} \| ([0-9a-f ]+) \| ([0-9a-f ]+) \|$", FORMAT, re.M).groups()
    packed = pack(counting_codes(bits), bits)
    assert to_hex(packed) == stored
    assert " ".join(f"{int(word) & 0xFFFFFFFF:08x}" for word in packed[0]) == words


def test_whole_layer_table():
    rows = torch.zeros(1, dtype=torch.int64)
    layer = DenseSparseWeight.from_codes(
        LayerScheme(WeightScheme(4, 32, symmetric=False), SparseScheme()),
        counting_codes(4),
        scale=torch.tensor([[0.5]], dtype=torch.bfloat16),
        zero_points=torch.tensor([[8]]),
        sparse=SparsePart.from_coo(rows, rows + 3, torch.tensor([-1.25], dtype=torch.bfloat16), (1, 32)),
    )
    section = FORMAT.split("## A whole layer, in bytes")[1]
    for name, tensor in layer.to_tensors().items():
        assert f"| {name} | {to_hex(tensor)} |" in section
    weight = dequantize(layer)[0]
    assert (weight[0], weight[3], weight[15]) == (-4, -3.75, 3.5)
    assert layer.stored_bits() / 32 == 8.5


def test_every_tensor_is_specified():
    dense, w8a8 = re.findall(r"^## Tensors of a (?:dense-plus-sparse|W8A8) layer\n(.*?)(?=^## )", FORMAT, re.M | re.S)
    named = {section: set(re.findall(r"^\| ([a-z_]+) \|", section, re.M)) - {"tensor"} for section in (dense, w8a8)}
    known = {dense: set(), w8a8: set()}
    for codebook, symmetric in ((False, False), (False, True), (True, True)):
        scheme = LayerScheme(WeightScheme(4, -1, symmetric, codebook), SparseScheme(), bias_correction=True)
        known[dense] |= set(tensor_names(scheme))
    for dynamic, symmetric in ((False, False), (True, True)):
        scheme = LayerScheme(WeightScheme(8), None, ActivationScheme(dynamic, symmetric), bias_correction=True)
        known[w8a8] |= set(tensor_names(scheme))
    assert named == known


def test_every_key_of_a_scheme_is_specified():
    for section, scheme in (("weights", WeightScheme), ("activations", ActivationScheme)):
        for key in fields(scheme):
            assert re.search(rf"^\| {section}\.{key.name} \|", FORMAT, re.M), key.name
    for key in ("sparse", "activations", "bias_correction"):
        assert re.search(rf"^\| {key} \|", FORMAT, re.M), key


def test_rounding_by_hand():
    token, codes = re.search(r"^By hand: the token \((.*?)\), .* q = \((.*?)\)\.$", FORMAT, re.M).groups()
    x = torch.tensor([float(number) for number in token.split(", ")])
    assert quantize_input(x, ActivationScheme(dynamic=True)).codes.tolist() == [int(code) for code in codes.split(", ")]
