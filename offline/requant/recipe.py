"""A recipe: all that decides the bytes of a checkpoint, apart from the model. Validated; presets are YAML data."""

import re
from dataclasses import asdict, dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any, Self

import yaml
from requant_kernels.scheme import LayerScheme, SparseScheme, WeightScheme

from requant.errors import InputError

BASES = ("rtn",)
DEFAULT = "rtn-w4"
MAX_OUTLIERS = 0.1  # beyond it, CSR costs more than a wider dense part gains


@dataclass(frozen=True)
class Recipe:
    """``outliers``: share of each matrix's entries in the sparse part. ``ignore``: regular expressions; a linear
    layer whose full name one of them matches stays as it is. Raises InputError, or SchemeError of ``weights``."""

    weights: WeightScheme
    base: str = "rtn"
    outliers: float = 0.0
    ignore: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.base not in BASES:
            raise InputError(f"recipe: base {self.base!r} is not one of: {', '.join(BASES)}")
        if not 0 <= self.outliers <= MAX_OUTLIERS:
            raise InputError(
                f"recipe: outliers {self.outliers:.2%} is outside 0 % to {MAX_OUTLIERS:.0%} (half a percent is '0.5%')"
            )
        for pattern in self.ignore:
            try:
                re.compile(pattern)
            except (re.error, TypeError) as error:
                raise InputError(f"recipe: ignore {pattern!r} is not a regular expression ({error})") from None
        if type(self.seed) is not int:
            raise InputError(f"recipe: seed {self.seed!r} is not an integer")

    @property
    def layer_scheme(self) -> LayerScheme:
        return LayerScheme(self.weights, SparseScheme() if self.outliers else None)

    @classmethod
    def from_dict(cls, data: Any, where: str = "recipe") -> Self:
        known = [field.name for field in fields(cls)]
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
                "ignore": tuple(ignore),
            }
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"ignore": list(self.ignore)}


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
