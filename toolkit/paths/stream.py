"""Many threads read pieces of the file into pinned memory, each piece copied to the device while the next one is read.

A file that is not in memory is read ahead of the threads by the kernel, so that the next boot is warm; where memory is too
short for that, past the page cache (O_DIRECT).
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from io import FileIO

import torch

from ..errors import ModelFileError
from ..header import ModelFile
from ..layout import Layout, Run
from ..storage import Storage, available_memory

THREADS = 16
NETWORK_THREADS = 4  # a network drive is read in long runs, few at a time
SLOT = 8 << 20  # bytes of pinned memory; two a thread: the ring holds 256 MB
PAGE = mmap.PAGESIZE  # what O_DIRECT wants offsets, lengths and addresses to be multiples of
CHUNK = SLOT - 2 * PAGE  # bytes of one piece; room is left for the pages that it begins and ends in
_ring: list[
    torch.Tensor
] = []  # pinned slots, kept for the next load: pinning takes longer than reading
_ring_lock = threading.Lock()
log = logging.getLogger("ark")


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
    chunks, number = list(layout.chunks(CHUNK)), itertools.count()

    def take() -> Iterator[Run]:
        while (index := next(number)) < len(chunks):  # one step of a count is atomic
            yield chunks[index]

    direct = past_the_cache(file, storage)
    if not direct and not storage.warm and hasattr(os, "posix_fadvise"):
        with file.path.open("rb") as source:
            os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
    count = max(1, min(NETWORK_THREADS if storage.network else THREADS, len(chunks)))
    with ThreadPoolExecutor(count, "ark-stream") as pool:
        workers = [pool.submit(_fill, file, target, take(), advance, direct) for _ in range(count)]
    for worker in workers:
        worker.result()


def past_the_cache(file: ModelFile, storage: Storage) -> bool:
    """Whether to read a file past the page cache: it is not in memory, and memory is too short to hold it."""
    memory = available_memory()
    short = memory is not None and memory < 2 * file.size
    return short and not storage.warm and not storage.network and hasattr(os, "O_DIRECT")


def _fill(
    file: ModelFile, target: torch.Tensor, runs: Iterator[Run], advance: Callable, direct: bool
) -> None:
    """One thread's work: read a piece into a slot, send it on its way, take the other slot."""
    cuda = target.device.type == "cuda"
    stream = torch.cuda.Stream(target.device) if cuda else None
    if cuda:
        stream.wait_stream(torch.cuda.default_stream(target.device))
    slots = [(_borrow(cuda), torch.cuda.Event() if cuda else None) for _ in range(2)]
    try:
        with _open(file, direct) as source:
            for run, (slot, copied) in zip(runs, itertools.cycle(slots), strict=False):
                if cuda:
                    copied.synchronize()
                piece = _read(file, source, run, slot)
                with torch.cuda.stream(stream) if cuda else contextlib.nullcontext():
                    target[run.target : run.target + run.nbytes].copy_(piece, non_blocking=cuda)
                if cuda:
                    copied.record(stream)
                advance(run.nbytes)
    finally:
        if cuda:
            stream.synchronize()
            with _ring_lock:
                _ring.extend(slot for slot, _ in slots)


def _borrow(pinned: bool) -> torch.Tensor:
    """A slot [SLOT] uint8, at the start of a page."""
    with _ring_lock:
        if pinned and _ring:
            return _ring.pop()
    if pinned:
        return torch.empty(SLOT, dtype=torch.uint8, pin_memory=True)
    return torch.frombuffer(mmap.mmap(-1, SLOT), dtype=torch.uint8)


def _open(file: ModelFile, direct: bool) -> FileIO:
    if direct:
        try:
            descriptor = os.open(file.path, os.O_RDONLY | os.O_DIRECT)
        except OSError as error:
            log.info("Ark igniter: %s is read through the page cache (%s).", file.path.name, error)
        else:
            return os.fdopen(descriptor, "rb", buffering=0)
    return file.path.open("rb", buffering=0)


def _read(file: ModelFile, source: FileIO, run: Run, slot: torch.Tensor) -> torch.Tensor:
    """Read whole pages around a piece; returns the piece as a view of the slot."""
    lead = run.source % PAGE
    wanted, done = lead + run.nbytes, 0
    memory = memoryview(slot.numpy())[: -(-wanted // PAGE) * PAGE]
    source.seek(run.source - lead)
    while done < wanted:
        count = source.readinto(memory[done:])
        if not count:
            raise ModelFileError(
                f"{file.path.name} ended at byte {run.source - lead + done} while it was read.",
                "Wait until it is written completely, then queue again.",
            )
        done += count
    return slot[lead:wanted]
