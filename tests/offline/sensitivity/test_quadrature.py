import pytest
from requant.sensitivity.quadrature import nodes


@pytest.mark.parametrize("rule", ["midpoint", "trapezoid", "paper", "start", "end"])
def test_weights_sum_to_one(rule: str) -> None:
    assert sum(weight for _, weight in nodes(rule, 5)) == pytest.approx(1)


@pytest.mark.parametrize(("rule", "order"), [("midpoint", 2), ("trapezoid", 2), ("paper", 1)])
def test_the_error_falls_with_the_order_of_the_rule(rule: str, order: int) -> None:
    def error(intervals: int) -> float:
        return abs(sum(weight * (3 * t**2 + t) for t, weight in nodes(rule, intervals)) - 1.5)

    # the paper's N points span N-1 intervals, hence the tolerance
    assert error(64) / error(128) == pytest.approx(2**order, rel=0.02)


def test_the_papers_rule_includes_both_ends_unweighted() -> None:
    assert nodes("paper", 3) == [(0.0, 1 / 3), (0.5, 1 / 3), (1.0, 1 / 3)]


def test_midpoint_at_8_beats_the_papers_rule_at_32() -> None:
    def error(rule: str, intervals: int) -> float:
        return abs(sum(weight * (0.92 * t + 0.08 * t**2) for t, weight in nodes(rule, intervals)) - 0.46 - 0.08 / 3)

    assert error("midpoint", 8) < error("paper", 32)


@pytest.mark.parametrize(
    ("rule", "intervals", "message"),
    [
        ("simpson", 4, "'simpson' is not one of midpoint, trapezoid"),
        ("midpoint", 0, "at least 1"),
        ("paper", 1, "at least 2"),
    ],
)
def test_refuses(rule: str, intervals: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nodes(rule, intervals)
