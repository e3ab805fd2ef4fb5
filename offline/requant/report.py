"""What a run or a checkpoint consists of, as data: one row per linear layer, totals, and the table of both."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

import torch
from requant_kernels.errors import CheckpointError
from requant_kernels.layer import QuantizedLayer
from requant_kernels.scheme import LayerScheme
from requant_kernels.weight import DenseSparseWeight

REPORT_FILE = "requant_report.json"


@dataclass(frozen=True)
class LayerRow:
    """One linear layer of shape [N, K], without its bias.

    scheme None: stored as it was, for ``reason``; that of an output head says which it is, quantized or not.
    bytes: all that is stored of it; nnz: sparse entries; error: relative Frobenius norm |W - W~| / |W|, None where it
    was not measured.
    """

    name: str
    shape: tuple[int, int]
    scheme: LayerScheme | None
    bytes: int
    nnz: int = 0
    error: float | None = None
    reason: str | None = None

    @classmethod
    def skipped(cls, name: str, weight: torch.Tensor, reason: str) -> Self:
        return cls(name, (weight.shape[0], weight.shape[1]), None, weight.nbytes, reason=reason)

    @classmethod
    def quantized(cls, name: str, stored: QuantizedLayer, error: float, reason: str | None = None) -> Self:
        sparse = stored.sparse if isinstance(stored, DenseSparseWeight) else None
        shape = (stored.out_features, stored.in_features)
        nnz = sparse.nnz if sparse else 0
        return cls(name, shape, stored.scheme, stored.stored_bits() // 8, nnz, error, reason)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        known = {field.name: data[field.name] for field in fields(cls)}
        scheme = known["scheme"] and LayerScheme.from_dict(known["scheme"])
        return cls(**known | {"shape": tuple(known["shape"]), "scheme": scheme})

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def bits_per_weight(self) -> float:
        """True bits a weight: everything stored, over N*K."""
        return 8 * self.bytes / self.numel

    @property
    def sparse_percent(self) -> float:
        return 100 * self.nnz / self.numel

    def to_dict(self) -> dict[str, Any]:
        derived = {"bits_per_weight": round(self.bits_per_weight, 4), "sparse_percent": round(self.sparse_percent, 4)}
        return asdict(self) | derived

    def describe(self) -> str:
        """The scheme in a few characters: 'w4 g64 asym + sparse'."""
        if self.scheme is None:
            return f"as it was: {self.reason}"
        return self.scheme.describe() + (f": {self.reason}" if self.reason else "")


@dataclass(frozen=True)
class Totals:
    """Over the quantized layers of the blocks, unless it says otherwise, so that figures of two runs can be compared
    whatever became of the output head.

    skipped_layers: counts an output head that is not quantized; head_bits_per_weight: None of such a one.
    checkpoint_bytes: all tensors of the checkpoint.
    """

    layers: int
    skipped_layers: int
    bits_per_weight: float
    sparse_percent: float
    bytes: int
    head_bits_per_weight: float | None
    checkpoint_bytes: int

    @classmethod
    def of(cls, rows: Iterable[LayerRow], head: LayerRow, checkpoint_bytes: int) -> "Totals":
        """rows: the linear layers of all blocks."""
        rows = list(rows)
        quantized = [row for row in rows if row.scheme]
        numel = sum(row.numel for row in quantized) or 1
        stored = sum(row.bytes for row in quantized)
        return cls(
            layers=len(quantized),
            skipped_layers=len(rows) - len(quantized) + (head.scheme is None),
            bits_per_weight=round(8 * stored / numel, 4),
            sparse_percent=round(100 * sum(row.nnz for row in quantized) / numel, 4),
            bytes=stored,
            head_bits_per_weight=round(head.bits_per_weight, 4) if head.scheme else None,
            checkpoint_bytes=checkpoint_bytes,
        )

    def describe(self) -> str:
        bits = self.head_bits_per_weight
        return (
            f"{self.layers} linear layers at {self.bits_per_weight:.2f} true bits a weight "
            f"({self.sparse_percent:.2f} % sparse), {self.skipped_layers} as they were; "
            + (f"the output head at {bits:.2f}; " if bits else "")
            + f"{megabytes(self.checkpoint_bytes)} in all"
        )


@dataclass(frozen=True)
class Report:
    """What ``quantize`` did; written into the checkpoint as requant_report.json, so it holds nothing that differs
    between two runs of the same recipe on the same model: no paths, no dates, no times."""

    model: str
    recipe: dict[str, Any]
    producer: dict[str, str]
    layers: tuple[LayerRow, ...]
    total: Totals
    original_bytes: int
    calibration: dict[str, Any] | None = None

    def remarks(self) -> list[str]:
        """What calibration decided about whole layers, a line for each kind of decision."""
        calibration = self.calibration or {}
        decisions = calibration.get("decisions", {}).values()
        lines = []
        if unreached := calibration.get("unreached"):
            lines.append(f"rounded to nearest, for no calibration token reaches them: {', '.join(unreached)}")
        if found := calibration.get("divergence"):
            lines.append(
                "training through the whole model took the divergence from the original's predictions from "
                f"{found['before']:.3g} to {found['after']:.3g} nats a token" + ("" if found["kept"] else ": undone")
            )
        if pairs := [one["alpha"] for one in decisions if "alpha" in one]:
            lines.append(f"{len(pairs) - pairs.count(None)} of {len(pairs)} pairs equalized")
        if static := [one["switched"] for one in decisions if "static_error" in one]:
            lines.append(f"{sum(static)} of {len(static)} layers that were to be static made dynamic")
        if tried := [one["corrected"] for one in decisions if "error_with" in one]:
            lines.append(f"bias correction kept in {sum(tried)} of {len(tried)} layers")
        return lines

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"layers": [row.to_dict() for row in self.layers]}

    @classmethod
    def of(cls, folder: Path) -> Self:
        """That of the checkpoint in ``folder``. Raises CheckpointError where it has none that can be read."""
        try:
            data = json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))
            rows = tuple(LayerRow.from_dict(row) for row in data["layers"])
            return cls(**data | {"layers": rows, "total": Totals(**data["total"])})
        except FileNotFoundError:
            raise CheckpointError(f"{folder}: has no {REPORT_FILE}; requant quantize writes one") from None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise CheckpointError(f"{folder / REPORT_FILE}: not a report of this version ({reason})") from None


def table(rows: Iterable[LayerRow]) -> str:
    """Fixed-width text: layer, shape, scheme, true bits, sparse share, size."""
    cells = [("layer", "shape", "scheme", "bits", "sparse", "size")]
    for row in rows:
        share = f"{row.sparse_percent:.2f} %" if row.scheme and row.scheme.sparse else "-"
        shape = f"{row.shape[0]} x {row.shape[1]}"
        cells.append((row.name, shape, row.describe(), f"{row.bits_per_weight:.2f}", share, megabytes(row.bytes)))
    widths = [max(len(line[column]) for line in cells) for column in range(6)]
    left = (0, 2)
    return "\n".join(
        "  ".join(
            text.ljust(width) if column in left else text.rjust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    )


def megabytes(size: int) -> str:
    return f"{size / 1e6:.2f} MB"
