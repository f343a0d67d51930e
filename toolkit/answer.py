"""A yes or no that a device is still finding out: asked for in the middle of its work, read when there is nothing else to do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import torch


class Answer:
    """Reads as a bool, which waits for what was asked.

    Args:
        found: of one bool, on any device; asked in its current stream.
    """

    def __init__(self, found: torch.Tensor):
        self._there, self._asked = found, None
        if found.is_cuda:
            with contextlib.suppress(RuntimeError):  # else it is brought by whoever reads it
                there = torch.empty_like(found, device="cpu", pin_memory=True)
                self._there = there.copy_(found, non_blocking=True)
                self._asked = torch.cuda.Event()
                self._asked.record(torch.cuda.current_stream(found.device))

    def __bool__(self) -> bool:
        if self._asked is not None:
            self._asked.synchronize()
        return bool(self._there)


def are_equal(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Answer:
    """Whether the tensors of each pair, of one shape, hold the same numbers."""
    return Answer(torch.stack([(a == b).all() for a, b in pairs]).all())
