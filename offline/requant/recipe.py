"""A recipe: all that decides the bytes of a checkpoint, apart from the model. Validated; presets are YAML data."""

import re
from dataclasses import asdict, dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any, Self

import yaml
from requant_kernels.scheme import LayerScheme, SparseScheme, WeightScheme

from requant.errors import InputError
from requant.settings import (
    BASES,
    CODEBOOK,
    DATA_FREE,
    PARTS,
    TRAINED,
    Calibration,
    Distillation,
    Selection,
    Training,
    part_from_dict,
)

DEFAULT = "rtn-w4"
MAX_OUTLIERS = 0.1  # beyond it, CSR costs more than a wider dense part gains


@dataclass(frozen=True)
class Recipe:
    """``outliers``, ``significant``: shares of all entries in the sparse part, chosen as ``selection`` says.
    ``training``: of the base ``learned``, by block; ``distillation``: of the same, through the whole model, off at 0
    steps. ``ignore``: regular expressions; a linear layer whose full name one of them matches stays as it is. Raises
    InputError, or SchemeError of ``weights``."""

    weights: WeightScheme
    base: str = "rtn"
    outliers: float = 0.0
    significant: float = 0.0
    calibration: Calibration = field(default_factory=Calibration)
    selection: Selection = field(default_factory=Selection)
    training: Training = field(default_factory=Training)
    distillation: Distillation = field(default_factory=Distillation)
    ignore: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.base not in BASES:
            raise InputError(f"recipe: base {self.base!r} is not one of: {', '.join(BASES)}")
        for name in ("outliers", "significant"):
            share = getattr(self, name)
            if not 0 <= share <= MAX_OUTLIERS:
                raise InputError(
                    f"recipe: {name} {share:.2%} is outside 0 % to {MAX_OUTLIERS:.0%} (half a percent is '0.5%')"
                )
        if self.weights.codebook != (self.base in CODEBOOK):
            needed = str(self.base in CODEBOOK).lower()
            raise InputError(f"recipe: base {self.base!r} needs weights.codebook {needed}")
        if self.distillation.steps and self.base not in TRAINED:
            raise InputError(f"recipe: distillation trains the base {TRAINED[0]!r}, not {self.base!r}")
        for pattern in self.ignore:
            try:
                re.compile(pattern)
            except (re.error, TypeError) as error:
                raise InputError(f"recipe: ignore {pattern!r} is not a regular expression ({error})") from None
        if type(self.seed) is not int:
            raise InputError(f"recipe: seed {self.seed!r} is not an integer")

    @property
    def layer_scheme(self) -> LayerScheme:
        return LayerScheme(self.weights, SparseScheme() if self.outliers or self.significant else None)

    @property
    def calibrated(self) -> bool:
        """Whether it takes calibration text, and so the whole model at once."""
        adaptive = self.outliers > 0 and self.selection.rule != "magnitude"
        return self.base not in DATA_FREE or self.significant > 0 or adaptive

    @classmethod
    def from_dict(cls, data: Any, where: str = "recipe") -> Self:
        known = [one.name for one in fields(cls)]
        if not isinstance(data, dict) or "weights" not in data:
            raise InputError(f"{where}: expected a mapping with at least the key 'weights'")
        if unknown := sorted(set(data) - set(known)):
            raise InputError(f"{where}: unknown key {unknown[0]!r} (known: {', '.join(known)})")
        ignore = data.get("ignore", ())
        if not isinstance(ignore, list | tuple):
            raise InputError(f"{where}: ignore {ignore!r} is not a list of regular expressions")
        return cls(
            **data
            | {
                "weights": WeightScheme.from_dict(data["weights"]),
                "outliers": parse_ratio(data.get("outliers", 0.0)),
                "significant": parse_ratio(data.get("significant", 0.0)),
                **{key: part_from_dict(kind, data.get(key, {}), f"{where}: {key}") for key, kind in PARTS.items()},
                "ignore": tuple(ignore),
            }
        )

    def to_dict(self) -> dict[str, Any]:
        """For reports: a calibration file by its name only, so that the same text gives the same bytes anywhere."""
        data = asdict(self) | {"ignore": list(self.ignore)}
        data["calibration"]["text"] = Path(self.calibration.text).name
        return data


def parse_ratio(value: object) -> float:
    """'0.5%' or 0.005 -> 0.005. Raises InputError."""
    text = str(value).strip()
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        raise InputError(f"{value!r} is not a ratio such as '0.5%' or 0.005") from None


def presets() -> dict[str, str]:
    """The text of every recipe that is shipped, by name."""
    folder = resources.files("requant") / "recipes"
    return {
        entry.name.removesuffix(".yaml"): entry.read_text(encoding="utf-8")
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name)
        if entry.name.endswith(".yaml")
    }


def load_recipe(name_or_path: str | Path) -> Recipe:
    """A preset by name, or a YAML file. Raises InputError."""
    shipped = presets()
    if str(name_or_path) in shipped:
        where, text = f"recipe {name_or_path}", shipped[str(name_or_path)]
    else:
        where, path = str(name_or_path), Path(name_or_path)
        if not path.is_file():
            raise InputError(f"recipe {where!r}: no such file, and not one of the presets: {', '.join(shipped)}")
        text = path.read_text(encoding="utf-8")
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{where}: not YAML ({' '.join(str(error).split())})") from None
    return Recipe.from_dict(data, where)
