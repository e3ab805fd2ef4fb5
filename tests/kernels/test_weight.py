import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from requant_kernels.errors import CheckpointError
from requant_kernels.reference import dense_sparse_linear, dequantize, dequantize_dense
from requant_kernels.scheme import LayerScheme, SparseScheme, WeightScheme
from requant_kernels.weight import DenseSparseWeight

from tests.kernels.strategies import layers, random_weight

FULL = LayerScheme(WeightScheme(4, 32, symmetric=False), SparseScheme())


def naive(weight: DenseSparseWeight) -> torch.Tensor:
    """docs/FORMAT.md element by element, in float64."""
    codes, zeros = weight.codes().tolist(), weight.zero_points()
    out = torch.zeros(weight.out_features, weight.in_features, dtype=torch.float64)
    for n in range(weight.out_features):
        for k in range(weight.in_features):
            if weight.codebook is not None:
                out[n, k] = weight.codebook[n, codes[n][k]].double()
            else:
                group = k // weight.group_size
                zero = 1 << (weight.scheme.weights.bits - 1) if zeros is None else int(zeros[n, group])
                out[n, k] = (codes[n][k] - zero) * weight.scale[n, group].double()
        if weight.sparse is not None:
            for e in range(int(weight.sparse.row_offsets[n]), int(weight.sparse.row_offsets[n + 1])):
                out[n, int(weight.sparse.columns[e])] += weight.sparse.values[e].double()
    return out


def column_ranges(columns: int) -> st.SearchStrategy[tuple[int, int]]:
    """Any, and those that begin and end where words do."""
    blocks = st.integers(0, columns // 32).map(lambda block: 32 * block)
    ends = st.tuples(*(st.one_of(st.integers(0, columns), blocks) for _ in range(2)))
    return ends.filter(lambda pair: pair[0] != pair[1]).map(lambda pair: (min(pair), max(pair)))


@given(weight=layers())
def test_dequantize_equals_the_definition(weight):
    torch.testing.assert_close(dequantize(weight).double(), naive(weight), rtol=1e-6, atol=1e-6)


@given(weight=layers())
def test_tensors_round_trip_and_count_every_stored_bit(weight):
    tensors = weight.to_tensors()
    again = DenseSparseWeight.from_tensors(weight.scheme, tensors, "layer")
    assert torch.equal(dequantize(again), dequantize(weight))
    assert weight.stored_bits() == sum(len(t.flatten().view(torch.uint8)) * 8 for t in tensors.values())


@given(weight=layers(), data=st.data())
def test_slicing_commutes_with_dequantize(weight, data):
    dense = dequantize(weight)
    rows = data.draw(st.lists(st.integers(0, weight.out_features - 1), min_size=1, max_size=8))
    assert torch.equal(dequantize(weight.take_rows(torch.tensor(rows))), dense[rows])
    start, stop = data.draw(column_ranges(weight.in_features))
    part = weight.take_columns(start, stop)
    part.validate("slice")
    assert torch.equal(dequantize(part), dense[:, start:stop])


@given(weight=layers(), data=st.data())
def test_layers_cut_by_columns_add_up_to_the_whole(weight, data):
    x = torch.randn(3, weight.in_features)
    cut = data.draw(st.integers(1, weight.in_features - 1))
    bounds = ((0, cut), (cut, weight.in_features))
    total = sum(dense_sparse_linear(x[:, a:b], weight.take_columns(a, b)) for a, b in bounds)
    torch.testing.assert_close(total, dense_sparse_linear(x, weight), rtol=1e-4, atol=1e-4)


@given(weight=layers(), parts=st.integers(1, 3))
def test_concat_inverts_a_split_by_rows(weight, parts):
    pieces = [weight.take_rows(index) for index in torch.arange(weight.out_features).tensor_split(parts) if len(index)]
    whole = DenseSparseWeight.concat_rows(pieces)
    whole.validate("whole")
    assert torch.equal(dequantize(whole), dequantize(weight))


def test_concat_of_different_schemes_is_refused():
    other = LayerScheme(WeightScheme(3, 32), None)
    with pytest.raises(ValueError, match="must share scheme"):
        DenseSparseWeight.concat_rows([random_weight(FULL, (4, 64)), random_weight(other, (4, 64))])


@pytest.mark.parametrize("correction", [False, True], ids=["plain", "bias correction"])
def test_reference_product_and_bias(correction):
    weight = random_weight(LayerScheme(FULL.weights, FULL.sparse, bias_correction=correction), (8, 64))
    x, bias = torch.randn(2, 3, 64), torch.randn(8)
    expected = x.double() @ naive(weight).T + bias.double()
    if correction:
        expected = expected + weight.bias_correction.double()
    torch.testing.assert_close(dense_sparse_linear(x, weight, bias).double(), expected, rtol=1e-5, atol=1e-5)


def test_the_residual_is_beside_the_dense_part_not_in_its_place():
    weight = random_weight(FULL, (8, 64), density=1.0)
    assert torch.equal(dequantize(weight), dequantize_dense(weight) + weight.sparse.to_dense())


def _swap(name, change):
    def tamper(tensors):
        tensors[name] = change(tensors[name].clone())

    return tamper


def _set(name, index, value):
    def change(tensor):
        tensor[index] = value
        return tensor

    return _swap(name, change)


def _out_of_range(tensors):
    columns = tensors["sparse_columns"].to(torch.int32)
    columns[-1] = 64
    tensors["sparse_columns"] = columns.to(torch.uint16)


def _duplicate_column(tensors):
    columns = tensors["sparse_columns"].to(torch.int32)
    columns[1] = columns[0]
    tensors["sparse_columns"] = columns.to(torch.uint16)


TAMPERED = {
    "column outside": (_out_of_range, r"sparse_columns: 64 is outside \[0, 64\)"),
    "column twice": (_duplicate_column, "sparse_columns: not ascending and unique"),
    "offsets fall": (_set("sparse_row_offsets", 2, 9999), "sparse_row_offsets: not monotone"),
    "offsets short": (_set("sparse_row_offsets", -1, 1), "sparse_row_offsets: not monotone"),
    "offsets of other rows": (_swap("sparse_row_offsets", lambda t: torch.cat([t, t[-1:]])), "9 rows, expected 8"),
    "values longer": (_swap("sparse_values", lambda t: torch.cat([t, t])), "does not match sparse_values"),
    "nan value": (_set("sparse_values", 0, float("nan")), "sparse_values: not finite"),
    "columns int64": (_swap("sparse_columns", lambda t: t.to(torch.int64)), "sparse_columns: dtype"),
    "inf scale": (_set("weight_scale", 0, float("inf")), "weight_scale: not finite"),
    "zero scale": (_set("weight_scale", 0, 0.0), "weight_scale: not positive"),
    "scale of another shape": (_swap("weight_scale", lambda t: t[:, :1]), "weight_scale: shape"),
    "scale int": (_swap("weight_scale", lambda t: t.to(torch.int32)), "weight_scale: dtype"),
    "values of another dtype": (_swap("sparse_values", lambda t: t.float()), "sparse_values: dtype"),
    "packed float": (_swap("weight_packed", lambda t: t.float()), "weight_packed: torch.float32"),
    "packed of odd width": (_swap("weight_packed", lambda t: t[:, :3]), "weight_packed: 3 words"),
    "zero points short": (_swap("weight_zero_point", lambda t: t[:4]), "weight_zero_point: shape"),
    "zero points with a tail": (
        _swap("weight_zero_point", lambda t: t | 1 << 8),
        "weight_zero_point: not zero above a row's last code",
    ),
    "nan correction": (_set("bias_correction", 0, float("nan")), "bias_correction: not finite"),
    "correction of another length": (_swap("bias_correction", lambda t: t[:4]), "bias_correction: shape"),
    "missing": (lambda tensors: tensors.pop("weight_scale"), "weight_scale: missing"),
    "extra": (lambda tensors: tensors.update(g_idx=torch.zeros(1)), "g_idx: not expected"),
}


@pytest.mark.parametrize(("tamper", "message"), TAMPERED.values(), ids=TAMPERED)
def test_tampered_tensors_are_refused_by_name(tamper, message):
    scheme = LayerScheme(FULL.weights, FULL.sparse, bias_correction=True)
    tensors = random_weight(scheme, (8, 64), density=0.3).to_tensors()
    tamper(tensors)
    with pytest.raises(CheckpointError, match=message) as caught:
        DenseSparseWeight.from_tensors(scheme, tensors, "model.layers.0.mlp.up_proj")
    assert str(caught.value).startswith("model.layers.0.mlp.up_proj.")
