"""Results as two Markdown tables: what the servers take, and how fast they are."""

from collections.abc import Sequence

from requant.bench.results import Cell, Ratio, Results, middle
from requant.markdown import table

TIMES = ("median_ttft_ms", "median_itl_ms", "p99_itl_ms")


def markdown(results: Results) -> str:
    return f"{_footprints(results)}\n\n{_speeds(results)}"


def _footprints(results: Results) -> str:
    rows = [
        (name, _mb(one.disk_bytes), f"{one.startup_seconds:.0f}", _mb(one.peak_resident_bytes))
        for name, one in results.models.items()
    ]
    return table(("model", "on disk, MB", "start-up, s", "peak memory of its server, MB"), rows)


def _speeds(results: Results) -> str:
    over = f"over {results.reference} (low-high)" if results.reference else ""
    head = ("workload", "model", "tokens/s", "first token, ms", "inter-token, ms", "its p99, ms", over)
    return table(
        head if over else head[:-1],
        [_speed(results, cell, name)[: len(head) if over else -1] for cell in results.cells for name in results.models],
    )


def _speed(results: Results, cell: Cell, name: str) -> Sequence[str]:
    runs = cell.runs[name]
    # a single token has no successor: the client reports 0 then
    times = [f"{value:.1f}" if (value := middle(runs, key)) else "-" for key in TIMES]
    return (
        cell.work.name,
        name,
        f"{middle(runs, cell.work.throughput):.1f}",
        *times,
        _spread(results.ratio(cell, name)),
    )


def _spread(ratio: Ratio | None) -> str:
    return f"**{ratio.median:.2f}** ({ratio.low:.2f}-{ratio.high:.2f})" if ratio else ""


def _mb(count: int) -> str:
    return f"{count / 1e6:.1f}" if count else "-"
