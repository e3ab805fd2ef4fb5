"""What is done to a layer on a GPU before any kernel runs, on one that is not there (tests/pretend_cuda.py)."""

import pytest
import torch
from requant_kernels.dense_sparse import interface
from requant_kernels.dense_sparse.dequantized import Dequantized
from requant_kernels.dense_sparse.triton.implementation import Triton
from requant_kernels.reference import linear
from requant_kernels.rounding.layer import round_layer
from requant_kernels.scheme import ActivationScheme, LayerScheme, SparseScheme, WeightScheme
from requant_kernels.w8a8 import interface as w8a8_interface
from requant_kernels.w8a8.triton.implementation import Triton as W8A8Triton

from tests.kernels.strategies import random_w8a8, random_weight
from tests.pretend_cuda import CUDA, pretend_cuda

CPU = torch.device("cpu")
SPARSE = SparseScheme()
LAYERS = {
    "w4 sparse": random_weight(LayerScheme(WeightScheme(4, 64), SPARSE), (40, 256)),
    "w4": random_weight(LayerScheme(WeightScheme(4, 64)), (40, 256)),
    "w3 asymmetric sparse": random_weight(LayerScheme(WeightScheme(3, 32, False), SPARSE), (33, 96)),
    "w2 codebook sparse": random_weight(LayerScheme(WeightScheme(2, codebook=True), SPARSE), (48, 320)),
    "w8 a group a row, crowded": random_weight(LayerScheme(WeightScheme(8, -1), SPARSE), (17, 512), density=0.6),
}
INT8 = {
    f"{'dynamic' if dynamic else 'static'} {'symmetric' if symmetric else 'asymmetric'}": random_w8a8(
        ActivationScheme(dynamic, symmetric), (24, 70)
    )
    for dynamic in (True, False)
    for symmetric in (True, False)
}


@pytest.mark.parametrize("weight", LAYERS.values(), ids=LAYERS.keys())
def test_a_layer_is_laid_out_there(weight):
    def prepared(device):
        return Triton().prepare(weight, interface.LayerConfig.of(weight, torch.bfloat16, device))

    with pretend_cuda():
        there = prepared(CUDA)
        assert all(tensor.is_cuda for tensor in there.tensors.values())
        found = {name: tensor.cpu() for name, tensor in there.tensors.items()}
    here = prepared(CPU)
    assert there.meta == here.meta
    assert found.keys() == here.tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in here.tensors.items())


@pytest.mark.parametrize("weight", INT8.values(), ids=INT8.keys())
def test_an_int8_layer_is_laid_out_there(weight):
    with pretend_cuda():
        config = w8a8_interface.LayerConfig.of(weight, torch.bfloat16, CUDA)
        there = W8A8Triton().prepare(weight, config)
        assert all(tensor.is_cuda for tensor in there.tensors.values())


@pytest.mark.parametrize("weight", [*LAYERS.values(), *INT8.values()], ids=[*LAYERS, *INT8])
def test_the_reference_runs_there(weight):
    x = torch.randn(3, weight.in_features)
    with pretend_cuda():
        y = linear(x.to(CUDA), weight.to(CUDA)).cpu()
    torch.testing.assert_close(y, linear(x, weight))


def test_what_no_kernel_takes_is_decoded_there():
    weight, x = LAYERS["w4 sparse"], torch.randn(3, 256)
    with pretend_cuda():
        prepared = Dequantized().prepare(weight, interface.LayerConfig.of(weight, torch.float32, CUDA))
        y = Dequantized().apply(x.to(CUDA), list(prepared.tensors.values()), None, 40, []).cpu()
    torch.testing.assert_close(y, linear(x, weight))


@pytest.mark.parametrize(
    "scheme",
    [LayerScheme(WeightScheme(4, 64, False)), LayerScheme(WeightScheme(8), activations=ActivationScheme(True))],
    ids=["w4", "w8a8"],
)
def test_a_layer_is_rounded_in_flight_there(scheme):
    weight = torch.randn(24, 128, dtype=torch.bfloat16)
    with pretend_cuda():
        there = {name: tensor.cpu() for name, tensor in round_layer(weight.to(CUDA), scheme).to_tensors().items()}
    here = round_layer(weight, scheme).to_tensors()
    assert all(torch.equal(there[name], tensor) for name, tensor in here.items())
