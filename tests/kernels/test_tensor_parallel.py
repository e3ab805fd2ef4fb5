"""What may be split, in words that do not depend on who says them; what a cut through groups makes of a layer."""

import pytest
import torch
from requant_kernels.reference import dequantize
from requant_kernels.scheme import LayerScheme, WeightScheme
from requant_kernels.tensor_parallel import Shape, cut_groups, obstacles

from tests.kernels.strategies import random_weight


@pytest.mark.parametrize(
    ("shape", "degree", "fields"),
    [
        (Shape(12, 12, 384), 1, []),
        (Shape(12, 2, 384), 4, []),  # two ranks share each key/value head
        (Shape(12, 1, 384), 3, []),
        (Shape(12, 2, 384), 3, ["key_value_heads"]),
        (Shape(12, 4, 384), 6, ["key_value_heads"]),
        (Shape(12, 4, 386), 4, ["width"]),
        (Shape(12, 4, 384, 16), 4, []),
        (Shape(12, 4, 384, 2), 4, ["linear_heads"]),
        (Shape(12, 4, 384, state_heads=8), 4, []),
        (Shape(12, 4, 384, state_heads=6, state_groups=2), 4, ["state_heads", "state_groups"]),
        (Shape(9, 3, 1536), 2, ["heads", "key_value_heads"]),
        (Shape(4, 2, 128), 3, ["heads", "key_value_heads", "width"]),
    ],
    ids=str,
)
def test_what_forbids_a_degree(shape, degree, fields):
    found = obstacles(shape, degree)
    assert list(found) == fields
    for field, why in found.items():
        assert why.startswith(f"{getattr(shape, field)} ")
        assert why.endswith(f"{degree} ranks")


@pytest.mark.parametrize("degree", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("group_size", [-1, 32, 64, 128])
def test_the_words_about_groups_are_what_slicing_does(degree, group_size):
    columns = 384
    weight, share = random_weight(LayerScheme(WeightScheme(4, group_size)), (8, columns)), columns // degree
    sizes = {weight.take_columns(rank * share, (rank + 1) * share).group_size for rank in range(degree)}
    said = cut_groups(columns, group_size, degree)
    if said is None:
        assert sizes == {share if group_size == -1 else group_size}
    else:
        assert said.startswith(f"{degree} ranks of {share} columns cut groups of {group_size} ")
        assert said.endswith(f"into groups of {min(sizes)}")
        assert len(sizes) == 1


@pytest.mark.parametrize("group_size", [-1, 64])
def test_slices_add_up_however_they_are_cut(group_size):
    weight = random_weight(LayerScheme(WeightScheme(3, group_size, symmetric=False)), (8, 192))
    for degree in (3, 4, 12):
        share = 192 // degree
        slices = [dequantize(weight.take_columns(rank * share, (rank + 1) * share)) for rank in range(degree)]
        assert torch.equal(torch.cat(slices, 1), dequantize(weight))
