import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from requant_kernels.errors import CheckpointError
from requant_kernels.layer import layer_from_tensors
from requant_kernels.reference import dequantize, w8a8_linear
from requant_kernels.scheme import ActivationScheme
from requant_kernels.w8a8.weight import W8A8Weight

from tests.kernels.strategies import random_w8a8, w8a8_layers

STATIC = ActivationScheme(dynamic=False, symmetric=False)


@given(weight=w8a8_layers())
def test_tensors_round_trip_and_count_every_stored_bit(weight):
    tensors = weight.to_tensors()
    again = layer_from_tensors(weight.scheme, tensors, "layer")
    assert isinstance(again, W8A8Weight)
    assert torch.equal(dequantize(again), dequantize(weight))
    assert weight.stored_bits() == sum(len(t.flatten().view(torch.uint8)) * 8 for t in tensors.values())


@given(weight=w8a8_layers(), data=st.data())
def test_slicing_commutes_with_dequantize(weight, data):
    dense = dequantize(weight)
    rows = data.draw(st.lists(st.integers(0, weight.out_features - 1), min_size=1, max_size=8))
    assert torch.equal(dequantize(weight.take_rows(torch.tensor(rows))), dense[rows])
    start = data.draw(st.integers(0, weight.in_features - 1))
    stop = data.draw(st.integers(start + 1, weight.in_features))
    part = weight.take_columns(start, stop)
    part.validate("slice")
    assert torch.equal(dequantize(part), dense[:, start:stop])


@given(weight=w8a8_layers(), parts=st.integers(1, 3))
def test_concat_inverts_a_split_by_rows(weight, parts):
    pieces = [weight.take_rows(index) for index in torch.arange(weight.out_features).tensor_split(parts) if len(index)]
    whole = W8A8Weight.concat_rows(pieces)
    whole.validate("whole")
    x = torch.randn(3, weight.in_features)
    assert torch.equal(w8a8_linear(x, whole), w8a8_linear(x, weight))


def test_static_layers_cut_by_columns_add_up_to_the_whole():
    weight, x = random_w8a8(STATIC, (8, 64), bias_correction=True), torch.randn(5, 64)
    total = sum(w8a8_linear(x[:, a:b], weight.take_columns(a, b)) for a, b in ((0, 20), (20, 64)))
    torch.testing.assert_close(total, w8a8_linear(x, weight))


def test_concat_of_layers_with_different_input_steps_is_refused():
    one = random_w8a8(STATIC, (4, 64))
    tensors = one.to_tensors() | {"input_scale": one.input_scale * 2}
    with pytest.raises(ValueError, match="must share input_scale"):
        W8A8Weight.concat_rows([one, layer_from_tensors(one.scheme, tensors, "other")])
    with pytest.raises(ValueError, match="must share scheme"):
        W8A8Weight.concat_rows([one, random_w8a8(ActivationScheme(dynamic=True), (4, 64))])


def _set(name, value):
    def tamper(tensors):
        tensors[name] = tensors[name].clone()
        tensors[name][0] = value

    return tamper


def _swap(name, change):
    return lambda tensors: tensors.update({name: change(tensors[name])})


TAMPERED = {
    "float codes": (_swap("weight", lambda t: t.float()), "weight: torch.float32"),
    "flat codes": (_swap("weight", torch.flatten), r"weight: torch.int8 \[512\], not int8"),
    "no codes": (_swap("weight", lambda t: t[:0]), r"weight: torch.int8 \[0, 64\], not int8"),
    "scale of another length": (_swap("weight_scale", lambda t: t[:4]), "weight_scale: shape"),
    "scale int": (_swap("weight_scale", lambda t: t.to(torch.int32)), "weight_scale: dtype"),
    "nan scale": (_set("weight_scale", float("nan")), "weight_scale: not finite"),
    "zero scale": (_set("weight_scale", 0.0), "weight_scale: not positive"),
    "input scale per token": (_swap("input_scale", lambda t: t.repeat(2)), "input_scale: shape"),
    "inf input scale": (_set("input_scale", float("inf")), "input_scale: not finite"),
    "zero input scale": (_set("input_scale", 0.0), "input_scale: not positive"),
    "negative input scale": (_set("input_scale", -1.0), "input_scale: not positive"),
    "wide zero point": (_swap("input_zero_point", lambda t: t.to(torch.int32)), "input_zero_point: dtype"),
    "nan correction": (_set("bias_correction", float("nan")), "bias_correction: not finite"),
    "missing": (lambda tensors: tensors.pop("input_scale"), "input_scale: missing"),
    "extra": (lambda tensors: tensors.update(weight_packed=torch.zeros(1)), "weight_packed: not expected"),
}


@pytest.mark.parametrize(("tamper", "message"), TAMPERED.values(), ids=TAMPERED)
def test_tampered_tensors_are_refused_by_name(tamper, message):
    weight = random_w8a8(STATIC, (8, 64), bias_correction=True)
    tensors = weight.to_tensors()
    tamper(tensors)
    with pytest.raises(CheckpointError, match=message) as caught:
        layer_from_tensors(weight.scheme, tensors, "model.layers.0.mlp.up_proj")
    assert str(caught.value).startswith("model.layers.0.mlp.up_proj.")
