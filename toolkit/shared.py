"""Changes to the whole process that several threads may want at the same time, like short turns of the interpreter."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable

TURN = 0.00005  # s for which a thread goes on while others wait


class Shared:
    """A context that changes something when the first one enters, and puts it back when the last one leaves.

    Each putting back what it had found would leave the change behind for good where they do not leave in the order in which
    they came.

    Args:
        change: makes the change, and lets the stack that it is given undo it.
    """

    def __init__(self, change: Callable[[contextlib.ExitStack], None]):
        self._change, self._lock, self._count = change, threading.Lock(), 0
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if not self._count:
                self._change(self._undo)
            self._count += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._count -= 1
            if not self._count:
                self._undo.close()


def _shorten(undo: contextlib.ExitStack) -> None:
    undo.callback(sys.setswitchinterval, sys.getswitchinterval())
    sys.setswitchinterval(TURN)


# else a thread that has little to do waits 5 ms for another, again and again
short_turns = Shared(_shorten)
