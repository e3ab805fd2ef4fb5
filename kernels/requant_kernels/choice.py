"""How an implementation is chosen: the first that can, in a fixed order, logged once per kind of layer; the last resort
as a warning."""

import logging
from collections.abc import Sequence
from functools import cache
from typing import Any, Protocol, TypeVar

_LOG = logging.getLogger(__name__)


class Candidate(Protocol):
    @property
    def name(self) -> str: ...

    def can_implement(self, config: Any) -> tuple[bool, str]:
        """(True, "") or (False, the reason in words that a user can act on)."""
        ...


One = TypeVar("One", bound=Candidate)


def first_able(candidates: Sequence[One], config: Any, kind: str) -> One:
    """The candidate for ``config``, a layer of ``kind``. Raises ValueError, with every reason, where none can."""
    refusals: list[str] = []
    for candidate in candidates:
        able, reason = candidate.can_implement(config)
        if able:
            level = logging.WARNING if candidate is candidates[-1] else logging.INFO
            _log_once(level, kind, candidate.name, tuple(refusals))
            return candidate
        refusals.append(f"{candidate.name}: {reason}")
    raise ValueError(f"no implementation of {kind}: {'; '.join(refusals)}")


@cache
def _log_once(level: int, kind: str, name: str, refusals: tuple[str, ...]) -> None:
    _LOG.log(level, "%s run as %s%s", kind, name, f" ({'; '.join(refusals)})" if refusals else "")
