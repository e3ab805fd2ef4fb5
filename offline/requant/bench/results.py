"""What was measured, and what follows from it: ratios to the reference, with their spread."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from requant.bench.client import Figures
from requant.bench.workloads import Workload


@dataclass(frozen=True)
class Footprint:
    """Of a model and its server; memory is that of all its processes together, 0 where it is not known."""

    disk_bytes: int
    startup_seconds: float
    peak_resident_bytes: int


@dataclass(frozen=True)
class Cell:
    """One workload: the figures of each model by its name, a repetition each, in the same order for all."""

    work: Workload
    runs: Mapping[str, Sequence[Figures]]


@dataclass(frozen=True)
class Ratio:
    """Of throughputs within a repetition; the extremes are over repetitions."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Results:
    """``models``: their footprints by name, that which the run is about first; ``reference``: what counts as 1."""

    models: Mapping[str, Footprint]
    reference: str | None
    cells: Sequence[Cell]

    def ratio(self, cell: Cell, name: str) -> Ratio | None:
        """Of ``name`` over the reference; None for the reference itself, and without one."""
        if self.reference in (None, name):
            return None
        pairs = zip(cell.runs[name], cell.runs[str(self.reference)], strict=True)
        key = cell.work.throughput
        found = sorted(ours[key] / theirs[key] for ours, theirs in pairs)
        return Ratio(statistics.median(found), found[0], found[-1])

    def to_dict(self) -> dict[str, Any]:
        """``ratios``: those of the first model, by kind of workload and number of streams."""
        first, *_ = self.models
        ratios: dict[str, dict[str, float]] = {}
        for cell in self.cells:
            if found := self.ratio(cell, first):
                ratios.setdefault(cell.work.shape.kind, {})[str(cell.work.streams)] = found.median
        return {
            "ratios": ratios,
            "reference": self.reference,
            "models": {name: asdict(footprint) for name, footprint in self.models.items()},
            "results": [self._row(cell, name) for cell in self.cells for name in self.models],
        }

    def _row(self, cell: Cell, name: str) -> dict[str, Any]:
        ratio = self.ratio(cell, name)
        return {
            **asdict(cell.work.shape),
            "streams": cell.work.streams,
            "prompts": cell.work.prompts,
            "throughput": cell.work.throughput,
            "model": name,
            "ratio": ratio and asdict(ratio),
            "repetitions": cell.runs[name],
        }


def middle(runs: Sequence[Figures], key: str) -> float:
    """The median over repetitions."""
    return statistics.median(run[key] for run in runs)
