import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from requant.sensitivity.selection import top_k

matrices = st.lists(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=8), min_size=1, max_size=4).map(
    lambda rows: {str(i): torch.tensor(row) for i, row in enumerate(rows)}
)


@given(matrices, st.integers(0, 32))
def test_equals_a_stable_sort_of_everything(scores: dict[str, torch.Tensor], k: int) -> None:
    entries = [(-float(v), name, i) for name, values in scores.items() for i, v in enumerate(values)]
    k = min(k, len(entries))
    expected = {(name, i) for _, name, i in sorted(entries, key=lambda entry: entry[0])[:k]}
    chosen = top_k(scores.items, k)
    assert {(name, int(i)) for name, index in chosen.items() for i in index} == expected


def test_ties_go_to_the_earlier_entry() -> None:
    chosen = top_k(lambda: [("a", torch.zeros(2, 2)), ("b", torch.zeros(3))], 5)
    assert [chosen["a"].tolist(), chosen["b"].tolist()] == [[0, 1, 2, 3], [0]]


def test_more_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="5 entries were asked for, but there are only 3"):
        top_k(lambda: [("a", torch.zeros(3))], 5)


def test_nan_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="layer: a sensitivity score is not a number"):
        top_k(lambda: [("layer", torch.tensor([1.0, float("nan")]))], 1)
