"""Rules for the integral over t in [0, 1] on the path from the original (t=0) to the quantized weights (t=1)."""

from typing import Literal, get_args

Rule = Literal["midpoint", "trapezoid", "paper", "start", "end"]


def nodes(rule: Rule, intervals: int) -> list[tuple[float, float]]:
    """(t, weight) pairs, in ascending t, weights summing to 1.

    midpoint   ``intervals`` centres; error O(1/N^2) (default)
    trapezoid  ``intervals`` + 1 points, both ends at half weight; error O(1/N^2)
    paper      the unweighted mean over ``intervals`` points that include both ends, which is what the printed values
               of arXiv 2503.01901 fit; error O(1/N)
    start, end the gradient at one end alone: the first-order and the end-point criteria

    Raises ValueError for an unknown rule or fewer intervals than the rule needs.
    """
    if rule not in get_args(Rule):
        raise ValueError(f"quadrature {rule!r} is not one of {', '.join(get_args(Rule))}")
    least = 2 if rule == "paper" else 1
    if intervals < least:
        raise ValueError(f"quadrature {rule!r} needs at least {least} intervals, not {intervals}")
    if rule == "start":
        return [(0.0, 1.0)]
    if rule == "end":
        return [(1.0, 1.0)]
    if rule == "midpoint":
        return [((k + 0.5) / intervals, 1 / intervals) for k in range(intervals)]
    if rule == "paper":
        return [(k / (intervals - 1), 1 / intervals) for k in range(intervals)]
    return [(k / intervals, (0.5 if k in (0, intervals) else 1.0) / intervals) for k in range(intervals + 1)]
