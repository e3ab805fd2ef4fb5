"""Progress on stderr: a bar on a terminal, a plain line every tenth of the way otherwise."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def track(items: Iterable[T], total: int, label: str) -> Iterator[T]:
    """Yields ``items``, of which there are ``total``, and reports each as done when the next is asked for."""
    if sys.stderr.isatty():
        yield from tqdm(items, total=total, desc=label, file=sys.stderr)
        return
    reported, started = 0, time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        if done == total or 10 * done // total > reported:
            reported = 10 * done // total
            left = (time.monotonic() - started) * (total - done) / done
            say(f"{label}: {done}/{total}" + (f", {left:.0f} s left" if left >= 1 else ""))


def say(text: str) -> None:
    """One line of progress."""
    print(text, file=sys.stderr, flush=True)
