"""Results as a picture: throughput by number of streams, a panel for each kind of workload. Needs matplotlib."""

from pathlib import Path

from requant.bench.results import Cell, Results, middle
from requant.errors import InputError
from requant.figures import require_matplotlib

FORMATS = (".png", ".svg", ".pdf")


def check_plot(path: Path) -> None:
    """Raises InputError where ``path`` can not be drawn: said before hours of measuring, not after."""
    if path.suffix not in FORMATS:
        raise InputError(f"--plot {path}: the name ends in one of {', '.join(FORMATS)}")
    require_matplotlib("--plot")


def draw(results: Results, path: Path) -> None:
    """Bars are medians, whiskers the extremes over repetitions."""
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(cell.work.shape.kind for cell in results.cells))
    figure = Figure(figsize=(4.5 * len(kinds), 4), layout="constrained")
    for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        cells = [cell for cell in results.cells if cell.work.shape.kind == kind]
        width = 0.8 / len(results.models)
        for number, name in enumerate(results.models):
            low, median, high = zip(*(_extremes(cell, name) for cell in cells), strict=True)
            places = [place + number * width for place in range(len(cells))]
            whiskers = [
                [m - a for m, a in zip(median, low, strict=True)],
                [b - m for m, b in zip(median, high, strict=True)],
            ]
            axes.bar(places, median, width, yerr=whiskers, capsize=3, label=name)
        middles = [place + (0.8 - width) / 2 for place in range(len(cells))]
        axes.set_xticks(middles, [str(cell.work.streams) for cell in cells])
        shape = cells[0].work.shape
        axes.set_title(f"{kind}: {shape.input} tokens in, {shape.output} out")
        axes.set_xlabel("streams")
        axes.set_ylabel("tokens/s" if kind == "decode" else "tokens/s, prompts included")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center")
    figure.savefig(path, dpi=150)


def _extremes(cell: Cell, name: str) -> tuple[float, float, float]:
    found = [run[cell.work.throughput] for run in cell.runs[name]]
    return min(found), middle(cell.runs[name], cell.work.throughput), max(found)
