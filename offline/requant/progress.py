"""Progress on stderr: a bar on a terminal, a plain line every tenth of the way otherwise."""

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def track(items: Iterable[T], total: int, label: str) -> Iterator[T]:
    """Yields ``items``, of which there are ``total``, and reports each as done when the next is asked for."""
    if sys.stderr.isatty():
        yield from tqdm(items, total=total, desc=label, file=sys.stderr)
        return
    reported = 0
    for done, item in enumerate(items, start=1):
        yield item
        if done == total or 10 * done // total > reported:
            reported = 10 * done // total
            print(f"{label}: {done}/{total}", file=sys.stderr, flush=True)
