"""What must hold at the end, and a line for whatever does not."""

import re
from collections import Counter
from collections.abc import Mapping

# vLLM's own level, a traceback, or an access log line with a status of 500 and more
_BAD_LINE = re.compile(r"\bERROR\b|^Traceback |\" 5\d\d\b")
_GAUGE = re.compile(r"^vllm:(num_requests_running|num_requests_waiting|kv_cache_usage_perc)(?:\{[^}]*\})? (\S+)$", re.M)
SHOWN = 5


def busy(metrics: str) -> dict[str, float]:
    """Gauges of the server's /metrics that are not zero once everyone has left."""
    totals: dict[str, float] = {}
    for name, value in _GAUGE.findall(metrics):
        totals[name] = totals.get(name, 0.0) + float(value)
    return {name: value for name, value in totals.items() if value}


def bad_lines(log: str) -> list[str]:
    """Of the server's log: errors that no client was told of."""
    return [line for line in log.splitlines() if _BAD_LINE.search(line)]


def failures(
    *,
    unexpected: Mapping[str, int],
    growth_mb: float,
    bound_mb: float,
    left_busy: Mapping[str, float],
    changed: list[str],
    log: str,
) -> list[str]:
    """Empty where everything held."""
    found = [f"{count} x {message}" for message, count in Counter(unexpected).most_common(SHOWN)]
    if len(unexpected) > SHOWN:
        found.append(f"and {len(unexpected) - SHOWN} other kinds of answers that were not expected")
    if growth_mb > bound_mb:
        found.append(f"memory grew by {growth_mb:.1f} MB after warm-up, more than {bound_mb:.1f}")
    found += [f"after everyone had left: {name} is {value:g}" for name, value in left_busy.items()]
    bad = bad_lines(log)
    if bad:
        found.append(f"{len(bad)} errors in the server's log, such as\n  " + "\n  ".join(bad[:SHOWN]))
    return found + changed
