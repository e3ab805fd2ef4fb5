"""Real layers of vLLM that hold one quantized layer each, without a model around them."""

import torch
from requant_kernels import reference
from requant_kernels.layer import QuantizedLayer
from requant_kernels.scheme import ActivationScheme, LayerScheme, SparseScheme, WeightScheme
from vllm.model_executor.layers.linear import (
    LinearBase,
)
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from tests.kernels.strategies import random_w8a8, random_weight
from vllm_requant.linear import DenseSparseLinearMethod, W8A8LinearMethod

SCHEME = LayerScheme(WeightScheme(4, 64, symmetric=False), SparseScheme())
W8A8 = [
    LayerScheme(WeightScheme(8), None, ActivationScheme(dynamic, symmetric), bias_correction=not symmetric)
    for dynamic in (True, False)
    for symmetric in (True, False)
]
K = 192


class OneMethod(QuantizationConfig):
    """The configuration of a model that has a single quantized layer."""

    get_name = get_supported_act_dtypes = get_min_capability = get_config_filenames = from_config = None

    def __init__(self, scheme: LayerScheme, names: list[str], in_flight: bool) -> None:
        super().__init__()
        kind = W8A8LinearMethod if scheme.activations else DenseSparseLinearMethod
        self.method = kind(scheme, names, in_flight=in_flight)

    def get_quant_method(self, layer, prefix):
        return self.method


def build(
    kind: type[LinearBase], *sizes, names=("m.fc",), scheme=SCHEME, dtype=torch.float32, in_flight=False, **more
) -> LinearBase:
    more = {"bias": False, "return_bias": False, "params_dtype": dtype} | more
    return kind(*sizes, quant_config=OneMethod(scheme, list(names), in_flight), prefix="m", **more)


def load(layer: LinearBase, weight: QuantizedLayer, *shard, without=(), changed=()) -> None:
    for name, tensor in (weight.to_tensors() | dict(changed)).items():
        if name not in without:
            parameter = getattr(layer, name)
            parameter.weight_loader(parameter, tensor, *shard)


def stored(rows: int, seed: int = 0, columns: int = K, scheme: LayerScheme = SCHEME) -> QuantizedLayer:
    if scheme.activations:
        return random_w8a8(scheme.activations, (rows, columns), bias_correction=scheme.bias_correction, seed=seed)
    return random_weight(scheme, (rows, columns), seed=seed)


def assert_computes(layer: LinearBase, *weights: QuantizedLayer) -> None:
    layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(5, weights[0].in_features)
    expected = torch.cat([reference.linear(x, weight) for weight in weights], -1)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-4)
