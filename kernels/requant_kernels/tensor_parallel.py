"""What a degree of tensor parallelism does to a model in vLLM, in the words that `requant check --tp` and the server
share."""

from dataclasses import dataclass
from math import gcd
from typing import Any


@dataclass(frozen=True)
class Shape:
    """What vLLM splits: attention by heads (key/value heads are copied where there are fewer than ranks), the MLP by
    its inner ``width``, linear attention by its heads of keys, of which those of values are a multiple, state space
    layers by their heads, of which each group has as many (a single group is copied). Embeddings are padded and forbid
    nothing."""

    heads: int
    key_value_heads: int
    width: int
    linear_heads: int = 0
    state_heads: int = 0
    state_groups: int = 1

    @classmethod
    def of(cls, config: Any, heads: int, key_value_heads: int, width: int) -> "Shape":
        """What is beside attention as ``config``, of transformers, says; the rest as it is given."""
        linear_heads = getattr(config, "linear_num_key_heads", 0)
        state_heads, state_groups = getattr(config, "mamba_n_heads", 0), getattr(config, "mamba_n_groups", 1)
        return cls(heads, key_value_heads, width, linear_heads, state_heads, state_groups)


def obstacles(shape: Shape, degree: int) -> dict[str, str]:
    """What can not be split over ``degree`` ranks: the field of ``shape`` -> why. Empty where all can."""
    heads, key_value_heads, width = shape.heads, shape.key_value_heads, shape.width
    found = {}
    if heads % degree:
        found["heads"] = f"{heads} attention heads can not be split over {degree} ranks"
    if key_value_heads % degree and degree % key_value_heads:
        found["key_value_heads"] = (
            f"{key_value_heads} key/value heads can be neither split over nor copied to {degree} ranks"
        )
    if width % degree:
        found["width"] = f"{width} inner channels can not be split over {degree} ranks"
    if shape.linear_heads % degree:
        found["linear_heads"] = f"{shape.linear_heads} heads of linear attention can not be split over {degree} ranks"
    if shape.state_heads % degree:
        found["state_heads"] = f"{shape.state_heads} heads of state space layers can not be split over {degree} ranks"
    if shape.state_groups > 1 and shape.state_groups % degree:
        found["state_groups"] = (
            f"{shape.state_groups} groups of state space layers can not be split over {degree} ranks"
        )
    return found


def cut_groups(columns: int, group_size: int, degree: int) -> str | None:
    """What becomes of groups of ``group_size`` columns where ``degree`` ranks share a layer's ``columns``, which they
    divide; None where no group is cut. The numbers stay the same, but not every packed operator takes small groups."""
    share = columns // degree
    if group_size == -1 or share % group_size == 0:
        return None
    return f"{degree} ranks of {share} columns cut groups of {group_size} into groups of {gcd(group_size, share)}"
