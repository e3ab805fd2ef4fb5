"""What config.json says of layers whose schemes were fitted one by one."""

from requant.planning import fitted
from requant_kernels.scheme import CheckpointScheme, LayerScheme, WeightScheme

W2, W3, W4 = (LayerScheme(WeightScheme(bits, 64)) for bits in (2, 3, 4))


def test_layers_of_one_scheme_share_a_pattern():
    layers = {"a.0": W4, "a.1": W3, "ax1": W4, "a.2": W3, "a.3": W2, "a.4": W4}
    scheme = fitted(CheckpointScheme(W2, {"a.*": W4}, ("head",)), layers)
    assert (scheme.scheme, len(scheme.overrides)) == (W4, 2)
    assert {name: scheme.for_layer(name) for name in layers} == layers
    assert scheme.for_layer("head") is None
