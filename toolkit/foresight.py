"""What is likely to be wanted of a result next, by what was wanted of the ones before it: it can be begun before it is asked for.

Who makes a result calls `begin` and `made`, who wants something of it `take`.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

KINDS = 16  # of results that are remembered
MISS = 7  # what was begun for nothing counts as much as so many hits
MOST = 14  # the bound of a score, either way


class Taker(Protocol):
    """Who wants something of results."""

    def begin(self, result: Any) -> Any:
        """Begin with what will be wanted; None if that cannot be."""


@dataclass
class _Kind:
    """Who took the last result, and how often one was taken lately."""

    taker: Callable[[], Taker | None] = lambda: None
    score: int = 0


class Foresight:
    """Begins what was done with the last result of a kind for the next one, too, as long as that is hardly ever for nothing."""

    def __init__(self) -> None:
        self._kinds: OrderedDict[Hashable, _Kind] = OrderedDict()
        self._open = False  # whether the last result was not taken yet
        self._last: _Kind = _Kind()
        self._result: Callable[[], torch.Tensor | None] = lambda: None
        self._version = 0
        self._begun: tuple[Callable[[], Taker | None], Any] | None = None  # by whom, and what

    def begin(self, kind: Hashable, result: Any) -> None:
        """There is a new result, which is going to be `made`.

        Args:
            kind: those of which the same is wanted.
            result: what the taker begins with.
        """
        if self._open:  # nobody took the last one
            self._last.score = max(self._last.score - MISS, -MOST)
        self._last = self._kinds.setdefault(kind, _Kind())
        self._kinds.move_to_end(kind)
        while len(self._kinds) > KINDS:
            self._kinds.popitem(last=False)
        self._open, self._result, self._begun = True, lambda: None, None
        if self._last.score > 0 and (taker := self._last.taker()) is not None:
            begun = taker.begin(result)
            self._begun = None if begun is None else (self._last.taker, begun)

    def made(self, result: torch.Tensor) -> torch.Tensor:
        """The result as others get it; returned as it is. Of one that torch counts no writes of nothing is known."""
        if not result.is_inference():
            self._result, self._version = weakref.ref(result, self._gone), result._version
        return result

    def _gone(self, result: weakref.ref) -> None:
        """Nobody can take it any more."""
        if self._result is result:
            self._begun = None

    def take(self, taker: Taker, result: torch.Tensor) -> Any:
        """What was begun for this result, by this taker; None if nothing was, or if it was written to."""
        if self._result() is not result or result._version != self._version:
            return None
        by, begun = self._begun or (lambda: None, None)
        self._begun = None
        if self._open:
            self._open = False
            self._last.taker = weakref.ref(taker)
            self._last.score = min(self._last.score + 1, MOST)
        return begun if by() is taker else None
