"""What a run's steps take, and how much arithmetic that is, without holding the device up."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch


class StepClock:
    """Times the steps of one run by a mark at the end of each.

    Args:
        device: that the steps run on. On CUDA a mark is an event in its stream, which waits for nothing.
    """

    def __init__(self, device: torch.device):
        self._device = torch.device(device)
        self._marks: list = []

    def mark(self, *_: object) -> None:
        """A step has been asked for; takes what a sampler's callback is given."""
        if self._device.type != "cuda":
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        self._marks.append(event)

    def step_ms(self) -> float | None:
        """Median time from mark to mark in ms, None with fewer than two; waits for the last one.

        The first step has no beginning of its own: weights may still be on their way when it is asked for.
        """
        if len(self._marks) < 2:
            return None
        pairs = zip(self._marks, self._marks[1:], strict=False)
        if self._device.type != "cuda":
            return 1e3 * statistics.median(after - before for before, after in pairs)
        self._marks[-1].synchronize()
        return statistics.median(before.elapsed_time(after) for before, after in pairs)


class Pace:
    """Keeps whoever asks for steps one step ahead of the device, and no more.

    Asking takes a fraction of a step: without it all of them are asked for at once, and an interrupt comes when it is too late.

    Args:
        device: that the steps run on.
    """

    def __init__(self, device: torch.device):
        self._device = torch.device(device)
        self._before: Any = None  # the end of the step before

    def step(self) -> None:
        """A step has been asked for: wait until the one before it has ended."""
        if self._device.type != "cuda":
            return
        before, self._before = self._before, torch.cuda.Event(blocking=True)
        self._before.record(torch.cuda.current_stream(self._device))
        if before is not None:
            before.synchronize()


def step_flop(hidden_size: int, blocks: int, tokens: int) -> int:
    """Floating-point operations of one step's matrices and attention.

    In each block, double or single, a token passes 13 matrices of hidden_size x hidden_size (qkv 3, projection 1, MLP 9),
    and attention multiplies twice all tokens by all tokens.

    Args:
        hidden_size: of the transformer.
        blocks: double and single ones together.
        tokens: of the picture, the prompt and the references.

    Returns:
        The number, a multiplication with its addition counted as two.
    """
    return blocks * (26 * tokens * hidden_size**2 + 4 * tokens**2 * hidden_size)
