"""Ordinary memory that is there before it is needed: to touch fresh pages takes longer than to fill them.

Whoever takes a tensor keeps it, and another one of its kind is made ready in the background.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

import torch

LEAST, MOST = 1 << 20, 128 << 20  # bytes that are worth it, and that wait to be taken
Kind = tuple[tuple[int, ...], torch.dtype]


class Spare:
    """A tensor of each of the kinds that were asked for last."""

    def __init__(self) -> None:
        self._ready: OrderedDict[Kind, torch.Tensor] = OrderedDict()
        self._lock = threading.Lock()
        self._worker = ThreadPoolExecutor(1, "ark-spare")

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor on the CPU with anything in it."""
        with self._lock:
            found = self._ready.pop((shape, dtype), None)
        with torch.inference_mode(False):
            return torch.empty(shape, dtype=dtype) if found is None else found

    def prepare(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Have one ready for the next who asks, if it is large; what was asked for longest ago goes first."""
        if LEAST <= math.prod(shape) * dtype.itemsize <= MOST:
            self._worker.submit(self._make, (shape, dtype))

    def settle(self) -> None:
        """Wait until everything is ready."""
        self._worker.submit(int).result()

    def _make(self, kind: Kind) -> None:
        with torch.inference_mode(False):  # whoever takes it may write to it anywhere
            made = torch.empty(kind[0], dtype=kind[1]).zero_()
        with self._lock:
            self._ready[kind] = made
            self._ready.move_to_end(kind)
            while sum(tensor.nbytes for tensor in self._ready.values()) > MOST:
                self._ready.popitem(last=False)
