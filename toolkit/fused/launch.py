"""Launches of Triton kernels, also on memory that is there only while a recording runs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def launch(kernel: Any, grid: tuple[int, ...]) -> Callable[..., Any]:
    """As `kernel[grid]`, in a recording, too.

    What is allocated in a recording under cudaMallocAsync has an address and no memory yet: the driver does not know it, and
    Triton, which asks the driver about each tensor, refuses it. About an address that comes as a number it does not ask.
    """
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        return functools.partial(_by_address, kernel, grid)
    return kernel[grid]


@functools.lru_cache
def processors(device: torch.device) -> int:
    """How many a device has: a program that takes one piece of work after another is launched so many times."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def _by_address(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    compiled = kernel.warmup(*args, grid=grid, **options)  # it launches nothing
    values = [*args, *(options[name] for name in kernel.arg_names[len(args) :])]
    compiled[(*grid, 1, 1)[:3]](*(x.data_ptr() if isinstance(x, torch.Tensor) else x for x in values))  # fmt: skip
