"""Pictures of a run: a map of the model for each measure, blocks from left to right and kinds of layers from top to
bottom. Needs matplotlib."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from io import StringIO

from requant.errors import InputError
from requant.report import LayerRow, Report

_BLOCK = re.compile(r"^(?:.*?\.)?(\d+)\.(.+)$")
Values = Mapping[str, float]
Average = Callable[[list[tuple[float, float]]], float]


@dataclass(frozen=True)
class Map:
    """values: by a layer's full name; weights: the same, for the average of what shares a cell, such as experts; None:
    they are added up. signed: red where positive, blue where negative."""

    title: str
    caption: str
    values: Values
    weights: Values | None = None
    signed: bool = False

    def cells(self) -> dict[tuple[str, int], float]:
        """(kind, block) -> value. Layers outside of blocks have no place here."""
        found: dict[tuple[str, int], list[tuple[float, float]]] = {}
        for name, value in self.values.items():
            if match := _BLOCK.match(name):
                kind = re.sub(r"\d+", "*", match[2])
                weight = self.weights[name] if self.weights else 1.0
                found.setdefault((kind, int(match[1])), []).append((value, weight))
        total = {key: sum(value * weight for value, weight in cell) for key, cell in found.items()}
        if self.weights is None:
            return total
        return {key: value / sum(weight for _, weight in found[key]) for key, value in total.items()}


def require_matplotlib(what: str) -> None:
    """Raises InputError where it is not installed."""
    if find_spec("matplotlib") is None:
        raise InputError(f"{what} needs matplotlib: pip install 'vllm-requant[plot]'")


def maps(report: Report) -> list[Map]:
    """Those that the run has values for."""
    rows = [row for row in report.layers if row.scheme]
    sizes = {row.name: float(row.numel) for row in rows}
    calibration = report.calibration or {}
    integrals = calibration.get("integrals") or [{}]
    decisions = calibration.get("decisions", {})
    every = [
        Map(
            "Loss that rounding adds",
            "PQI summed over each matrix, nats per token of the calibration text, before significant weights are "
            "detached: what the matrix contributes to the change of the loss between the original and the rounded "
            "weights. Less than zero: rounding it happens to help.",
            integrals[0].get("matrices", {}),
            signed=True,
        ),
        Map(
            "True bits a weight", "Everything stored of a layer over its weights.", _of(rows, "bits_per_weight"), sizes
        ),
        Map("Sparse entries", "Per cent of a layer's weights.", _of(rows, "sparse_percent"), sizes),
        Map(
            "Error of the weights",
            "Frobenius norm of what is stored less the original, over that of the original. Calibrated rounding may "
            "raise it while the outputs come closer.",
            {row.name: row.error for row in rows if row.error is not None},
            sizes,
        ),
        Map(
            "Equalization",
            "Exponent alpha of the scales that move range from inputs to weights, by the norm or layer that they are "
            "folded into; a pair without a place was left alone.",
            {name: one["alpha"] for name, one in decisions.items() if one.get("alpha") is not None},
            dict.fromkeys(decisions, 1.0),
        ),
        Map(
            "Bias correction",
            "Output error with the correction over that without it, on inputs that it was not made from.",
            {
                row.name: one["error_with"] / one["error_without"]
                for row in rows
                if (one := decisions.get(row.name)) and one.get("error_without")
            },
            sizes,
        ),
    ]
    return [one for one in every if any(one.values.values()) and one.cells()]


def _of(rows: Iterable[LayerRow], measure: str) -> Values:
    return {row.name: getattr(row, measure) for row in rows}


def draw(one: Map) -> str:
    """As an SVG element, the same for the same values."""
    import matplotlib
    from matplotlib.figure import Figure

    cells = one.cells()
    kinds = list(dict.fromkeys(kind for kind, _ in cells))
    blocks = range(max(block for _, block in cells) + 1)
    grid = [[cells.get((kind, block), float("nan")) for block in blocks] for kind in kinds]
    limit = max(abs(value) for value in cells.values())
    figure = Figure(figsize=(3.6 + min(0.3 * len(blocks), 9), 0.9 + 0.28 * len(kinds)), layout="constrained")
    axes = figure.subplots()
    colours = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit} if one.signed else {"cmap": "viridis"}
    image = axes.pcolormesh(grid, edgecolors="white", linewidth=0.5, **colours)
    axes.invert_yaxis()
    axes.set_yticks([place + 0.5 for place in range(len(kinds))], kinds)
    marks = blocks[:: -(-len(blocks) // 16)]
    axes.set_xticks([block + 0.5 for block in marks], [str(block) for block in marks])
    axes.set_xlabel("block")
    figure.colorbar(image, ax=axes)
    written = StringIO()
    with matplotlib.rc_context({"svg.hashsalt": one.title, "svg.fonttype": "none"}):
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
    return written.getvalue().partition("<svg")[2].join(("<svg", ""))
