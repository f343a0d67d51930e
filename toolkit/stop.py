"""Ctrl-C that ends a run at its next step, so that only whole files are left."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")


class Stop:
    """While it is entered, a signal to end is taken down, and `check` raises it; a second one ends at once.

    Signals that this process was started to ignore stay ignored. Only the main thread can use it.

    Args:
        say: told once, when the signal comes.
    """

    def __init__(self, say: Callable[[], None] = lambda: None):
        self.asked: int | None = None  # the signal's number
        self._say = say
        self._before: dict[int, Any] = {}  # handlers by signal

    def check(self) -> None:
        """Raise KeyboardInterrupt, or SystemExit for another signal, if one has come."""
        if self.asked is not None:
            self._raise(self.asked)

    @staticmethod
    def _raise(number: int) -> None:
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.asked is not None:
            self._raise(number)
        self.asked = number
        with contextlib.suppress(
            OSError, RuntimeError
        ):  # the terminal is gone, or a line is being written
            self._say()

    def __enter__(self) -> Stop:
        for name in SIGNALS:
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) not in (signal.SIG_IGN, None):
                self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
