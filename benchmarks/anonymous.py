"""Anonymous memory: what a process has to have, without the files that it maps. Linux only."""

import re
import sys
import threading
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType

INTERVAL_SECONDS = 0.02


def anonymous_bytes() -> int:
    """Of this process now."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if not found:
        sys.exit("this system does not tell anonymous memory (RssAnon in /proc/self/status)")
    return int(found[1]) * 1024


class Peak(AbstractContextManager["Peak"]):
    """The most anonymous memory inside the block, looked up every 20 milliseconds."""

    def __init__(self) -> None:
        self.most = anonymous_bytes()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._over.wait(INTERVAL_SECONDS):
            self.most = max(self.most, anonymous_bytes())

    def __enter__(self) -> "Peak":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()
