"""What a requant checkpoint declares: the only schema of ``quantization_config`` (docs/FORMAT.md).

The classes are frozen and validated; ``from_dict`` refuses unknown keys by name, so a checkpoint of a
newer version can never be half-understood.
"""

import re
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import Any, Self

from requant_kernels.errors import SchemeError

QUANT_METHOD = "requant"
FORMAT_VERSION = 1
BITS = (2, 3, 4, 8)
GROUP_SIZES = (-1, 32, 64, 128, 256)


def _check_keys(cls: type, data: Any, where: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise SchemeError(f"{where}: expected an object, found {type(data).__name__}")
    known = {f.name for f in fields(cls)}
    if unknown := sorted(set(data) - known):
        raise SchemeError(f"{where}: unknown key {unknown[0]!r} (known: {', '.join(sorted(known))})")
    return data


@dataclass(frozen=True)
class WeightScheme:
    """The dense part: ``bits`` per code, one step per ``group_size`` input columns (-1: per row).

    ``codebook`` replaces the uniform grid by ``2**bits`` levels per row. Raises SchemeError.
    """

    bits: int
    group_size: int = -1
    symmetric: bool = True
    codebook: bool = False

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in BITS:
            raise SchemeError(f"weights.bits: {self.bits!r} is not one of {BITS}")
        if type(self.group_size) is not int or self.group_size not in GROUP_SIZES:
            raise SchemeError(f"weights.group_size: {self.group_size!r} is not one of {GROUP_SIZES}")
        for name in ("symmetric", "codebook"):
            if type(getattr(self, name)) is not bool:
                raise SchemeError(f"weights.{name}: {getattr(self, name)!r} is not true or false")
        if self.codebook and (self.group_size != -1 or not self.symmetric or self.bits == 8):
            raise SchemeError("weights.codebook: needs bits 2, 3 or 4, group_size -1 and symmetric true")

    @property
    def levels(self) -> int:
        return 1 << self.bits

    @property
    def midpoint(self) -> int:
        """The code that decodes to zero in a symmetric scheme."""
        return 1 << (self.bits - 1)

    def groups(self, in_features: int) -> int:
        """Steps per row of ``in_features`` columns; raises SchemeError where they do not divide."""
        if self.group_size == -1:
            return 1
        if in_features % self.group_size:
            raise SchemeError(f"group_size {self.group_size} does not divide in_features {in_features}")
        return in_features // self.group_size

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        data = _check_keys(cls, data, "weights")
        if "bits" not in data:
            raise SchemeError("weights: key 'bits' is missing")
        return cls(**data)


@dataclass(frozen=True)
class SparseScheme:
    """The sparse part: unstructured residuals, stored as CSR (16-bit columns where K <= 65536)."""

    format: str = "csr"

    def __post_init__(self) -> None:
        if self.format != "csr":
            raise SchemeError(f"sparse.format: {self.format!r} is not 'csr'")

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        return cls(**_check_keys(cls, data, "sparse"))


@dataclass(frozen=True)
class ActivationScheme:
    """How a W8A8 layer rounds its input to int8: ``dynamic``, one step per token, found while serving; else one step
    for the whole tensor, stored. Raises SchemeError."""

    dynamic: bool
    symmetric: bool = True
    bits: int = 8

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits != 8:
            raise SchemeError(f"activations.bits: {self.bits!r} is not 8")
        for name in ("dynamic", "symmetric"):
            if type(getattr(self, name)) is not bool:
                raise SchemeError(f"activations.{name}: {getattr(self, name)!r} is not true or false")

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        data = _check_keys(cls, data, "activations")
        if "dynamic" not in data:
            raise SchemeError("activations: key 'dynamic' is missing")
        return cls(**data)


# A W8A8 layer multiplies int8 by int8: only steps that are constant along a row can leave the sum.
W8A8_WEIGHTS = WeightScheme(bits=8, group_size=-1, symmetric=True)


@dataclass(frozen=True)
class LayerScheme:
    """How one linear layer is stored.

    ``sparse`` None: no sparse tensors. ``activations`` None: the input is not rounded; else the layer is W8A8.
    ``bias_correction``: a vector that is added to the output beside the model's own bias. Raises SchemeError.
    """

    weights: WeightScheme
    sparse: SparseScheme | None = None
    activations: ActivationScheme | None = None
    bias_correction: bool = False

    def __post_init__(self) -> None:
        if type(self.bias_correction) is not bool:
            raise SchemeError(f"bias_correction: {self.bias_correction!r} is not true or false")
        if self.activations and (self.weights != W8A8_WEIGHTS or self.sparse):
            raise SchemeError(
                "activations: need weights of 8 bits, group_size -1, symmetric, without codebook or sparse part"
            )

    def describe(self) -> str:
        """In a few characters: 'w4 g64 asym + sparse'."""
        weights, activations = self.weights, self.activations
        more = (" + sparse" if self.sparse else "") + (" + bias" if self.bias_correction else "")
        if activations:
            kind = "" if activations.symmetric else " asym"
            return f"w8a8 {'dynamic' if activations.dynamic else 'static'}{kind}{more}"
        group = "row" if weights.group_size == -1 else f"g{weights.group_size}"
        kind = "codebook" if weights.codebook else "sym" if weights.symmetric else "asym"
        return f"w{weights.bits} {group} {kind}{more}"

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        data = _check_keys(cls, data, "scheme")
        if "weights" not in data:
            raise SchemeError("scheme: key 'weights' is missing")
        sparse, activations = data.get("sparse"), data.get("activations")
        return cls(
            WeightScheme.from_dict(data["weights"]),
            None if sparse is None else SparseScheme.from_dict(sparse),
            None if activations is None else ActivationScheme.from_dict(activations),
            data.get("bias_correction", False),
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


OUTPUT_HEAD = "lm_head"  # its name in a checkpoint
# The one scheme of a quantized output head: where word embeddings are tied to it, tokens are looked up in its rows, so
# there can be nothing but codes and a step for each row.
HEAD_SCHEME = LayerScheme(W8A8_WEIGHTS, activations=ActivationScheme(dynamic=True))


def check_output_head(scheme: LayerScheme, name: str) -> None:
    """Raises SchemeError unless ``scheme`` is what the output head ``name`` can be quantized to."""
    if scheme != HEAD_SCHEME:
        raise SchemeError(
            f"{name}: an output head can be int8 with dynamic symmetric activations and no bias_correction, or ignored"
        )


def _compile(pattern: Any, where: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, TypeError, OverflowError, RecursionError) as error:
        raise SchemeError(f"{where}: {pattern!r} is not a regular expression ({error})") from None


@dataclass(frozen=True)
class CheckpointScheme:
    """``quantization_config`` as a whole.

    Patterns in ``overrides`` and ``ignore`` are regular expressions that must match a layer's full name;
    ``ignore`` wins, then the first matching override, then ``scheme``.
    """

    scheme: LayerScheme
    overrides: dict[str, LayerScheme] = field(default_factory=dict)
    ignore: tuple[str, ...] = ()
    producer: dict[str, Any] = field(default_factory=dict)
    version: int = FORMAT_VERSION
    quant_method: str = QUANT_METHOD

    def __post_init__(self) -> None:
        if self.quant_method != QUANT_METHOD:
            raise SchemeError(f"quant_method: {self.quant_method!r} is not {QUANT_METHOD!r}")
        if type(self.version) is not int or self.version != FORMAT_VERSION:
            raise SchemeError(f"version: {self.version!r} is not {FORMAT_VERSION}, the only version known here")
        for pattern in self.overrides:
            _compile(pattern, "overrides")
        for pattern in self.ignore:
            _compile(pattern, "ignore")

    def for_layer(self, name: str) -> LayerScheme | None:
        """The scheme of the linear layer ``name``, or None where it is stored unquantized."""
        ignored, overridden = self._patterns
        if any(pattern.fullmatch(name) for pattern in ignored):
            return None
        return next((scheme for pattern, scheme in overridden if pattern.fullmatch(name)), self.scheme)

    @cached_property
    def _patterns(self) -> tuple[list[re.Pattern[str]], list[tuple[re.Pattern[str], LayerScheme]]]:
        """``ignore`` and ``overrides``, compiled once: the cache of ``re`` is smaller than some checkpoints need."""
        overridden = [(re.compile(pattern), scheme) for pattern, scheme in self.overrides.items()]
        return [re.compile(pattern) for pattern in self.ignore], overridden

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        data = _check_keys(cls, data, "quantization_config")
        for key in ("quant_method", "version", "scheme"):
            if key not in data:
                raise SchemeError(f"quantization_config: key {key!r} is missing")
        overrides, ignore, producer = data.get("overrides", {}), data.get("ignore", []), data.get("producer", {})
        if not isinstance(overrides, dict):
            raise SchemeError("overrides: expected an object of pattern -> scheme")
        if not isinstance(ignore, list | tuple):
            raise SchemeError("ignore: expected a list of patterns")
        if not isinstance(producer, dict):
            raise SchemeError("producer: expected an object")
        return cls(
            scheme=LayerScheme.from_dict(data["scheme"]),
            overrides={pattern: LayerScheme.from_dict(value) for pattern, value in overrides.items()},
            ignore=tuple(ignore),
            producer=dict(producer),
            version=data["version"],
            quant_method=data["quant_method"],
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"ignore": list(self.ignore)}
