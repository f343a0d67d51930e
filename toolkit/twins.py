"""Tensors that lie on the CPU and, with the same numbers, on a GPU: to bring one there again is not needed then."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict

import torch

LEAST, MOST = 1 << 20, 96 << 20  # bytes that are worth it, and that are kept on devices


class Twins:
    """The last tensors that were brought from one side to the other, as long as those on the CPU live.

    Torch counts how often a tensor was written to; one that was since is no twin any more. Of tensors that are made in
    inference mode it does not count, so they are not kept.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[int, tuple[weakref.ref, int, torch.Tensor]] = OrderedDict()
        self._lock = threading.RLock()  # a tensor may die while it is held

    def remember(self, tensor: torch.Tensor, there: torch.Tensor) -> None:
        """Keep a pair.

        Args:
            tensor: on the CPU.
            there: the same on a GPU; nobody writes to it any more.
        """
        if tensor.is_inference() or not LEAST <= there.nbytes <= MOST:
            return
        key = id(tensor)
        with self._lock:
            self._known[key] = weakref.ref(tensor, lambda _: self._forget(key)), tensor._version, there  # fmt: skip
            self._known.move_to_end(key)
            while sum(kept.nbytes for _, _, kept in self._known.values()) > MOST:
                self._known.popitem(last=False)

    def find(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor | None:
        """What is the same on a device, contiguous; None if nothing is."""
        with self._lock:
            alive, version, there = self._known.get(id(tensor), (None, None, None))
            if alive is None or there is None or alive() is not tensor or there.device != device:
                return None
            if tensor._version != version:
                del self._known[id(tensor)]
                return None
            return there

    def _forget(self, key: int) -> None:
        with self._lock:
            if key in self._known and self._known[key][0]() is None:
                del self._known[key]
