"""What AWEQ can be told: plain validated data."""

from dataclasses import dataclass, replace
from typing import Literal, get_args

from requant_kernels.scheme import ActivationScheme

from requant.errors import InputError

EqualizationRange = Literal["none", "minmax", "absmax"]
Mode = Literal["none", "dynamic", "static"]
RangeMethod = Literal["minmax", "percentile", "mse"]
SEARCH = "search"


def _one_of(value: object, kind: object, where: str) -> None:
    if value not in get_args(kind):
        raise InputError(f"{where} {value!r} is not one of {', '.join(get_args(kind))}")


@dataclass(frozen=True)
class Equalization:
    """range: of a channel, max - min (AWEQ) or the largest magnitude (SmoothQuant). alpha: the activations' share of
    the balance, 0.5 in AWEQ, or 'search': for each pair the one with the least error of the block's output."""

    range: EqualizationRange = "none"
    alpha: float | str = SEARCH

    def __post_init__(self) -> None:
        _one_of(self.range, EqualizationRange, "equalization: range")
        number = type(self.alpha) in (int, float) and 0 <= float(self.alpha) <= 1
        if not number and self.alpha != SEARCH:
            raise InputError(f"equalization: alpha {self.alpha!r} is not a number from 0 to 1, or {SEARCH!r}")

    @property
    def wanted(self) -> bool:
        return self.range != "none"


@dataclass(frozen=True)
class Activations:
    """mode: whether inputs are rounded to int8, with a step for each token or one for all. range: how static steps are
    found (static_range.py). limit: by how much more than dynamic steps they may change the block's output (error.py); a
    layer that exceeds it is made dynamic, and the report says so. per_tensor: one step for the whole weight instead of
    one for each row, where inputs are rounded."""

    mode: Mode = "none"
    symmetric: bool = True
    range: RangeMethod = "mse"
    limit: float = 1e-3
    per_tensor: bool = False

    def __post_init__(self) -> None:
        _one_of(self.mode, Mode, "activations: mode")
        _one_of(self.range, RangeMethod, "activations: range")
        for name in ("symmetric", "per_tensor"):
            if type(getattr(self, name)) is not bool:
                raise InputError(f"activations: {name} {getattr(self, name)!r} is not true or false")
        if type(self.limit) not in (int, float) or not self.limit >= 0:
            raise InputError(f"activations: limit {self.limit!r} is not a number of at least 0")
        if self.per_tensor and self.mode == "none":
            raise InputError("activations: per_tensor is of W8A8, which mode 'none' is not; leave it out, or set mode")

    def with_mode(self, mode: Mode) -> "Activations":
        """'none' rounds no input, so that nothing is left for ``per_tensor`` to say."""
        return replace(self, mode=mode, per_tensor=self.per_tensor and mode != "none")

    @property
    def scheme(self) -> ActivationScheme | None:
        return ActivationScheme(self.mode == "dynamic", self.symmetric) if self.mode != "none" else None
