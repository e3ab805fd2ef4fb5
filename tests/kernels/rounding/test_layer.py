"""A layer rounded without data is the one that a checkpoint of base rtn stores; what needs data is refused."""

import pytest
import torch
from requant.pipeline import quantize_layer
from requant.recipe import Recipe
from requant_kernels.errors import SchemeError
from requant_kernels.rounding.layer import round_layer
from requant_kernels.scheme import W8A8_WEIGHTS, ActivationScheme, LayerScheme, SparseScheme, WeightScheme

W4 = WeightScheme(4, 64, symmetric=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "scheme",
    [
        *(LayerScheme(WeightScheme(bits, group)) for bits in (2, 3, 4, 8) for group in (-1, 64)),
        LayerScheme(W4),
        LayerScheme(W8A8_WEIGHTS, activations=ActivationScheme(dynamic=True)),
        LayerScheme(W8A8_WEIGHTS, activations=ActivationScheme(dynamic=True, symmetric=False)),
    ],
    ids=LayerScheme.describe,
)
def test_it_is_what_quantize_stores(scheme, dtype):
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(3)).to(dtype)
    layer, stored = round_layer(weight, scheme), quantize_layer(weight, scheme, Recipe(scheme.weights))
    assert layer.scheme == scheme
    assert layer.to_tensors().keys() == stored.to_tensors().keys()
    for name, tensor in stored.to_tensors().items():
        assert torch.equal(layer.to_tensors()[name], tensor), name


@pytest.mark.parametrize(
    ("scheme", "part"),
    [
        (LayerScheme(WeightScheme(4, codebook=True)), "a codebook"),
        (LayerScheme(W4, SparseScheme()), "a sparse part"),
        (LayerScheme(W8A8_WEIGHTS, activations=ActivationScheme(dynamic=False)), "a static input step"),
        (LayerScheme(W4, bias_correction=True), "a bias correction"),
    ],
    ids=["codebook", "sparse", "static", "bias correction"],
)
def test_what_rounding_does_not_decide_is_refused(scheme, part):
    with pytest.raises(SchemeError, match=f"^{part} can not be had by rounding alone"):
        round_layer(torch.ones(2, 64), scheme)
