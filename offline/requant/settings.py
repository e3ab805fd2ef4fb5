"""The parts of a recipe that have numbers of their own: plain validated data that loads at once."""

from dataclasses import dataclass, fields
from typing import Literal, get_args

from requant.aweq.settings import Activations, Equalization
from requant.errors import InputError

BASES = ("rtn", "clip", "gptq", "awq", "kmeans", "learned")
DATA_FREE = ("rtn", "clip")
EQUALIZED = ("awq",)  # whose input channels are scaled first
FISHER = ("kmeans",)  # that weigh entries by squared gradients
CODEBOOK = ("kmeans",)
TRAINED = ("learned",)

SENSITIVITIES = (
    "pqi",
    "pqi-signed",
    "pqi-second-moment",
    "fisher",
    "fisher-error",
    "first-order",
    "end-point",
    "marginal",
    "magnitude",
    "error",
    "random",
)
ADDITIVE = ("pqi-second-moment", "fisher-error")  # whose scores add up to a predicted loss
OutlierRule = Literal["magnitude", "quartiles", "adaptive"]
Quadrature = Literal["midpoint", "trapezoid", "paper"]
Unreached = Literal["refuse", "rtn"]
BUILTIN = "builtin"
DENSE, COMPRESSED = "dense", "compressed-tensors"
EXPORTS = (DENSE, COMPRESSED)


def _whole(part: object, where: str, **least: int) -> None:
    for name, minimum in least.items():
        value = getattr(part, name)
        if type(value) is not int or value < minimum:
            raise InputError(f"{where}: {name} {value!r} is not a whole number of at least {minimum}")


def _rates(part: object, where: str, *names: str) -> None:
    for name in names:
        value = getattr(part, name)
        if type(value) not in (int, float) or not 0 <= value < 1:
            raise InputError(f"{where}: {name} {value!r} is not a number from 0 to 1")


@dataclass(frozen=True)
class Calibration:
    """text: a UTF-8 file, or 'builtin' (English prose in the public domain); ``samples`` windows of ``seqlen`` tokens
    are taken from it. unreached: what to do with the layers of an expert that no token of it is routed to; 'rtn': round
    them to nearest and name them in the report."""

    text: str = BUILTIN
    samples: int = 64
    seqlen: int = 512
    unreached: Unreached = "refuse"

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise InputError(f"calibration: text {self.text!r} is not the name of a file, {BUILTIN!r} or 'wikitext2'")
        if self.unreached not in get_args(Unreached):
            raise InputError(
                f"calibration: unreached {self.unreached!r} is not one of {', '.join(get_args(Unreached))}"
            )
        _whole(self, "calibration", samples=2, seqlen=16)


@dataclass(frozen=True)
class Selection:
    """rule: how outliers are distributed over matrices (detach/outliers.py). sensitivity, steps, intervals: how
    significant weights are found (detach/significant.py); quadrature: of path integrals (sensitivity/quadrature.py);
    per_matrix: the same share of each matrix; restore: significant weights get their value back after quantization, as
    in the paper, instead of being left out of it."""

    rule: OutlierRule = "magnitude"
    sensitivity: str = "pqi-second-moment"
    steps: int = 1
    intervals: int = 4
    quadrature: Quadrature = "midpoint"
    per_matrix: bool = False
    restore: bool = False

    def __post_init__(self) -> None:
        if self.rule not in get_args(OutlierRule):
            raise InputError(f"selection: rule {self.rule!r} is not one of {', '.join(get_args(OutlierRule))}")
        if self.sensitivity not in SENSITIVITIES:
            raise InputError(f"selection: sensitivity {self.sensitivity!r} is not one of {', '.join(SENSITIVITIES)}")
        if self.quadrature not in get_args(Quadrature):
            raise InputError(
                f"selection: quadrature {self.quadrature!r} is not one of {', '.join(get_args(Quadrature))}"
            )
        for name in ("per_matrix", "restore"):
            if type(getattr(self, name)) is not bool:
                raise InputError(f"selection: {name} {getattr(self, name)!r} is not true or false")
        _whole(self, "selection", steps=1, intervals=2 if self.quadrature == "paper" else 1)


@dataclass(frozen=True)
class Training:
    """``steps`` of Adam on ``batch`` samples each; ``rate``: of offsets in quantization steps and of ranges, relative;
    it falls linearly to zero. An offset can thus travel steps * rate / 2 at most, and has to be able to travel 1/2."""

    steps: int = 80
    batch: int = 2
    rate: float = 0.02

    def __post_init__(self) -> None:
        _whole(self, "training", steps=0, batch=1)
        _rates(self, "training", "rate")


@dataclass(frozen=True)
class Distillation:
    """steps of ``batch`` windows each, none by default, drawn from the whole calibration text, none again before all
    others; rates rise over the first tenth and fall linearly to zero.

    ``rate``: of offsets, in quantization steps, of the base ``learned``; 0: codes stay as they are, which every base
    allows; ``range_rate``: of the ends of ranges or, where codes stay, of steps and codebooks, relative, at 2 bits, and
    half of it with each bit more, which moves the outermost weights by as much of a quantization step; ``value_rate``:
    of sparse values, in quantization steps.
    """

    steps: int = 0
    batch: int = 4
    rate: float = 0.0
    range_rate: float = 0.007
    value_rate: float = 0.002

    def __post_init__(self) -> None:
        _whole(self, "distillation", steps=0, batch=1)
        _rates(self, "distillation", "rate", "range_rate", "value_rate")

    @property
    def levels_alone(self) -> bool:
        """Whether codes stay as they are, once rounded."""
        return self.steps > 0 and not self.rate

    def share(self, step: int) -> float:
        """Of the full rates, at ``step`` (from 0)."""
        warmup = self.steps // 10 + 1
        return min((step + 1) / warmup, (self.steps - step) / (self.steps + 1 - warmup))


Part = Calibration | Selection | Training | Distillation | Equalization | Activations
PARTS: dict[str, type[Part]] = {
    "calibration": Calibration,
    "selection": Selection,
    "training": Training,
    "distillation": Distillation,
    "equalization": Equalization,
    "activations": Activations,
}


def part_from_dict(kind: type[Part], data: object, where: str) -> Part:
    """Raises InputError naming an unknown key."""
    known = [field.name for field in fields(kind)]
    if not isinstance(data, dict):
        raise InputError(f"{where}: expected a mapping (known keys: {', '.join(known)})")
    if unknown := sorted(set(data) - set(known)):
        raise InputError(f"{where}: unknown key {unknown[0]!r} (known: {', '.join(known)})")
    return kind(**data)
