"""Many threads read the file into pinned memory, each piece copied to the device while the next ones are read.

A file that is not in memory is read through the page cache, with the kernel's read-ahead, so that the next boot is warm;
where memory is too short for that, past the page cache (O_DIRECT).
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from ..header import ModelFile
from ..layout import Layout
from ..storage import Storage, available_memory
from .pump import pump

THREADS = 16
NETWORK_THREADS = 4  # a network drive is read in long runs, few at a time


def unavailable(file: ModelFile, device: torch.device, storage: Storage) -> str | None:
    """Why this path cannot serve, or None."""
    return None if device.type in ("cuda", "cpu") else f"{device.type} has no pinned copies"


def copy(
    file: ModelFile,
    layout: Layout,
    target: torch.Tensor,
    storage: Storage,
    advance: Callable[[int], None],
) -> None:
    """Fill a flat buffer; see `TransferPath.copy`."""
    direct = past_the_cache(file, storage)
    threads = NETWORK_THREADS if storage.network else THREADS
    pump(file, layout, target, advance, threads=threads, direct=direct)


def past_the_cache(file: ModelFile, storage: Storage) -> bool:
    """Whether to read a file past the page cache: it is not in memory, and memory is too short to hold it."""
    memory = available_memory()
    short = memory is not None and memory < 2 * file.size
    return short and not storage.warm and not storage.network and hasattr(os, "O_DIRECT")
