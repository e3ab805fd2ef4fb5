"""A recipe: all that decides the bytes of a checkpoint, apart from the model. Validated; presets are YAML data."""

import re
from dataclasses import asdict, dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any, Self

import yaml
from requant_kernels.scheme import W8A8_WEIGHTS, LayerScheme, SparseScheme, WeightScheme

from requant.aweq.settings import Activations, Equalization
from requant.detach.outliers import MOST
from requant.errors import InputError
from requant.settings import (
    ADDITIVE,
    BASES,
    CODEBOOK,
    DATA_FREE,
    EQUALIZED,
    PARTS,
    TRAINED,
    Calibration,
    Distillation,
    Selection,
    Training,
    part_from_dict,
)
from requant.texts import read_text

DEFAULT = "rtn-w4"
MAX_OUTLIERS = 0.1  # beyond it, CSR costs more than a wider dense part gains


@dataclass(frozen=True)
class Override:
    """Other weights and activations, for some layers. ``weights`` may be left out where ``activations`` are rounded."""

    weights: WeightScheme = W8A8_WEIGHTS
    activations: Activations = field(default_factory=Activations)

    @classmethod
    def from_dict(cls, data: Any, where: str) -> Self:
        known = [one.name for one in fields(cls)]
        if not isinstance(data, dict) or not data or set(data) - set(known):
            raise InputError(f"{where}: expected a mapping with the keys {' and '.join(known)}, or one of them")
        weights = WeightScheme.from_dict(data["weights"]) if "weights" in data else W8A8_WEIGHTS
        activations = part_from_dict(Activations, data.get("activations", {}), f"{where}: activations")
        assert isinstance(activations, Activations)
        return cls(weights, activations)


@dataclass(frozen=True)
class Recipe:
    """``outliers``, ``significant``: shares of all entries in the sparse part, chosen as ``selection`` says.
    ``training``: of the base ``learned``, by block; ``distillation``: of the same, through the whole model, off at 0
    steps. ``target_bits``: true bits a weight to spend, from which group size and ``significant`` follow, with
    ``mixed`` bits and group size of each matrix. ``equalization``, ``activations``, ``bias_correction``: AWEQ's steps.
    ``overrides``: other weights and activations for layers whose full name a regular expression matches. ``ignore``:
    regular expressions; a linear layer whose full name one of them matches stays as it is. ``quantize_lm_head``: int8
    weights and inputs for the output head, and so for embeddings that are tied to it. ``seed``: of all that is drawn;
    with another than 0 that includes the calibration windows. Raises InputError, or SchemeError of weights and
    activations."""

    weights: WeightScheme
    base: str = "rtn"
    outliers: float = 0.0
    significant: float = 0.0
    calibration: Calibration = field(default_factory=Calibration)
    selection: Selection = field(default_factory=Selection)
    training: Training = field(default_factory=Training)
    distillation: Distillation = field(default_factory=Distillation)
    equalization: Equalization = field(default_factory=Equalization)
    activations: Activations = field(default_factory=Activations)
    bias_correction: bool = False
    overrides: dict[str, "Override"] = field(default_factory=dict)
    target_bits: float | None = None
    mixed: bool = False
    ignore: tuple[str, ...] = ()
    quantize_lm_head: bool = False
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
        if self.selection.rule == "adaptive" and self.outliers > MOST:
            raise InputError(f"recipe: rule 'adaptive' gives no matrix more than {MOST:.0%} outliers")
        if self.weights.codebook != (self.base in CODEBOOK):
            needed = str(self.base in CODEBOOK).lower()
            raise InputError(f"recipe: base {self.base!r} needs weights.codebook {needed}")
        if self.distillation.steps and self.distillation.rate and self.base not in TRAINED:
            raise InputError(
                f"recipe: distillation.rate above 0 trains codes, of base {TRAINED[0]!r} alone; set it to 0 for "
                f"{self.base!r}, which trains steps, codebooks and sparse values"
            )
        self._check_target()
        for key in ("overrides", "ignore"):
            for pattern in getattr(self, key):
                try:
                    re.compile(pattern)
                except (re.error, TypeError) as error:
                    raise InputError(f"recipe: {key} {pattern!r} is not a regular expression ({error})") from None
        self._check_aweq()
        if type(self.quantize_lm_head) is not bool:
            raise InputError(f"recipe: quantize_lm_head {self.quantize_lm_head!r} is not true or false")
        if type(self.seed) is not int:
            raise InputError(f"recipe: seed {self.seed!r} is not an integer")

    def _check_aweq(self) -> None:
        if type(self.bias_correction) is not bool:
            raise InputError(f"recipe: bias_correction {self.bias_correction!r} is not true or false")
        if self.equalization.wanted and self.base in EQUALIZED:
            raise InputError(f"recipe: base {self.base!r} equalizes by itself; leave equalization out")
        if self.equalization.wanted and self.base in CODEBOOK:
            raise InputError(f"recipe: equalization is for uniform steps, not for the codebooks of base {self.base!r}")
        if self.settled and self.base in TRAINED:
            raise InputError(f"recipe: base {self.base!r} is trained without rounded inputs and bias correction")
        if self.settled and (self.distillation.steps or self.selection.restore):
            raise InputError("recipe: distillation and selection.restore know no rounded inputs and bias correction")
        if self.target_bits is not None and (self.settled or self.overrides):
            raise InputError("recipe: target_bits spends bits on weights alone: no activations, corrections, overrides")
        if any(scheme.weights.codebook != (self.base in CODEBOOK) for scheme in self.all_schemes):
            raise InputError(f"recipe: base {self.base!r} can not make the weights of every override")
        per_tensor = any(
            one.per_tensor for one in (self.activations, *(o.activations for o in self.overrides.values()))
        )
        if per_tensor and self.base != "rtn":
            raise InputError("recipe: activations.per_tensor needs base 'rtn'")

    @property
    def settled(self) -> bool:
        """Whether any layer has its input rounded or its bias corrected, after its weights are what they will be."""
        return self.bias_correction or any(scheme.activations for scheme in self.all_schemes)

    @property
    def restores(self) -> bool:
        """Whether significant weights get their value back when all else is done."""
        return self.selection.restore and self.significant > 0

    @property
    def layer_scheme(self) -> LayerScheme:
        return self._scheme(self.weights, self.activations)

    @property
    def layer_schemes(self) -> dict[str, LayerScheme]:
        """Those of ``overrides``."""
        return {pattern: self._scheme(one.weights, one.activations) for pattern, one in self.overrides.items()}

    @property
    def all_schemes(self) -> list[LayerScheme]:
        return [self.layer_scheme, *self.layer_schemes.values()]

    def activations_of(self, layer: str) -> Activations:
        """``layer``: its full name."""
        matching = (one.activations for pattern, one in self.overrides.items() if re.fullmatch(pattern, layer))
        return next(matching, self.activations)

    def _scheme(self, weights: WeightScheme, activations: Activations) -> LayerScheme:
        """A W8A8 layer has no sparse part."""
        entries = self.outliers or self.significant or self.target_bits
        sparse = SparseScheme() if entries and not activations.scheme else None
        return LayerScheme(weights, sparse, activations.scheme, self.bias_correction)

    def _check_target(self) -> None:
        if self.target_bits is None:
            if self.mixed:
                raise InputError("recipe: mixed needs target_bits")
            return
        if type(self.target_bits) not in (int, float) or not 1 <= self.target_bits <= 16:
            raise InputError(f"recipe: target_bits {self.target_bits!r} is not a number from 1 to 16")
        if self.selection.sensitivity not in ADDITIVE:
            predicting = " or ".join(ADDITIVE)
            raise InputError(f"recipe: target_bits needs sensitivity {predicting}, not {self.selection.sensitivity!r}")
        if self.selection.restore:
            raise InputError("recipe: target_bits leaves nothing for selection.restore to add; leave one of them out")

    @property
    def calibrated(self) -> bool:
        """Whether it takes calibration text, and so the whole model at once."""
        adaptive = self.outliers > 0 and self.selection.rule != "magnitude"
        chosen = self.significant > 0 or adaptive or self.target_bits is not None
        aweq = self.equalization.wanted or self.bias_correction
        static = any(one.activations is not None and not one.activations.dynamic for one in self.all_schemes)
        trained = self.base not in DATA_FREE or self.distillation.steps > 0
        return trained or chosen or aweq or static

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
        overrides = data.get("overrides", {})
        if not isinstance(overrides, dict):
            raise InputError(f"{where}: overrides {overrides!r} is not a mapping of regular expressions")
        return cls(
            **data
            | {
                "weights": WeightScheme.from_dict(data["weights"]),
                "outliers": parse_ratio(data.get("outliers", 0.0)),
                "significant": parse_ratio(data.get("significant", 0.0)),
                **{key: part_from_dict(kind, data.get(key, {}), f"{where}: {key}") for key, kind in PARTS.items()},
                "overrides": {key: Override.from_dict(one, f"{where}: {key}") for key, one in overrides.items()},
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
        text = read_text(path).content
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{where}: not YAML ({' '.join(str(error).split())})") from None
    return Recipe.from_dict(data, where)
