"""Moves a layout's bytes from a file to a device: some threads read, and one talks to the device.

All calls to CUDA come from one thread, because registering memory holds a lock for which every other call would wait. Each
reader has a stretch of the file to itself, which the disk and its read-ahead like best. Where a mapping is given, the
thread at the device works from the beginning of the file in the meantime, pinning window after window, and the readers
from its end: they meet where they meet.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import mmap
import os
import threading
from collections import deque
from collections.abc import Callable
from io import FileIO
from queue import SimpleQueue
from typing import Protocol

import torch

from ..errors import ModelFileError, TransferFailed
from ..header import ModelFile
from ..layout import Layout, Run

SLOT = 8 << 20  # bytes of pinned memory that one read fills
PAGE = mmap.PAGESIZE  # what O_DIRECT wants offsets, lengths and addresses to be multiples of
PIECE = SLOT - 2 * PAGE  # bytes of one read; room is left for the pages that it begins and ends in
_ring: list[torch.Tensor] = []  # pinned slots, kept for the next load: up to 256 MB
_ring_lock = threading.Lock()
log = logging.getLogger("ark")


class PinnedSource(Protocol):
    """What the pump asks of a mapped file."""

    def pinned_pieces(self, run: Run) -> list[tuple[torch.Tensor, Run]]:
        """Pin the windows that a run lies in; returns its bytes, one tensor a window."""


def pump(
    file: ModelFile,
    layout: Layout,
    target: torch.Tensor,
    advance: Callable[[int], None],
    *,
    threads: int,
    mapping: PinnedSource | None = None,
    direct: bool = False,
) -> None:
    """Fill a buffer.

    Args:
        file: whose bytes.
        layout: which ones, and where to.
        target: [layout.nbytes] uint8 on the device; filled on return.
        advance: called with the bytes of each piece as it leaves.
        threads: how many read; none is needed if there is a mapping.
        mapping: of the file, to be pinned on the way.
        direct: read past the page cache.

    Raises:
        ModelFileError: the file ended early.
        OSError: it could not be read.
        TransferFailed: memory could not be pinned.
    """
    cuda = target.device.type == "cuda"
    pieces = deque(layout.chunks(PIECE))
    threads = min(threads, len(pieces))
    shares = [pieces] * threads if mapping else _stretches(pieces, threads)
    free: SimpleQueue = SimpleQueue()  # slots; None tells a reader to stop
    # (bytes, run, slot); an exception; None from each reader at its end
    filled: SimpleQueue = SimpleQueue()
    travelling: deque[tuple[torch.cuda.Event, torch.Tensor]] = deque()
    stream = torch.cuda.Stream(target.device) if cuda else None

    def send(source: torch.Tensor, run: Run) -> None:
        target[run.target : run.target + run.nbytes].copy_(source, non_blocking=cuda)
        advance(run.nbytes)

    def send_read(item: tuple | Exception | None) -> None:
        if isinstance(item, Exception):
            raise item
        if item is None:
            return
        source, run, slot = item
        send(source, run)
        if not cuda:
            free.put(slot)
            return
        event = torch.cuda.Event()
        event.record(stream)
        travelling.append((event, slot))
        while len(travelling) > threads:  # the other half of the slots is being read into
            event, slot = travelling.popleft()
            event.synchronize()
            free.put(slot)

    def add_slot() -> None:
        for _ in range(2 if len(slots) < 2 * threads else 0):
            slots.append(_borrow(cuda))
            free.put(slots[-1])

    readers = [
        threading.Thread(target=_read_all, args=(file, share, free, filled, direct), daemon=True)
        for share in shares
    ]
    slots: list[torch.Tensor] = []
    try:
        with torch.cuda.stream(stream):  # for a CPU: None, which means nothing
            if stream:
                stream.wait_stream(torch.cuda.default_stream(target.device))
            for reader in readers:
                reader.start()
            ended = 0
            while mapping and (run := _take_first(pieces)):
                for source, part in mapping.pinned_pieces(run):
                    send(source, part)
                add_slot()
                while not filled.empty():
                    item = filled.get()
                    ended += item is None
                    send_read(item)
            while ended < threads:
                add_slot()
                item = filled.get()
                ended += item is None
                send_read(item)
    finally:
        for share in shares:
            share.clear()  # after an error, so that the readers stop
        for _ in readers:
            free.put(None)
        for reader in readers:
            if reader.ident is not None:
                reader.join()
        if stream:
            stream.synchronize()
            with _ring_lock:
                _ring.extend(slots)


def _stretches(pieces: deque[Run], count: int) -> list[deque[Run]]:
    """Divide pieces into stretches of neighbours, each with its first piece at the end, where readers take from."""
    ends = [len(pieces) * number // count for number in range(count + 1)]
    ordered = list(pieces)
    return [deque(reversed(ordered[i:k])) for i, k in itertools.pairwise(ends)]


def _take_first(pieces: deque[Run], size: int = 64 << 20) -> Run | None:
    """Neighbouring pieces from the beginning as one run of about `size` bytes; None when nothing is left."""
    taken: Run | None = None
    while taken is None or taken.nbytes < size:
        try:
            piece = pieces.popleft()
        except IndexError:
            break
        if taken is None:
            taken = piece
        elif piece.source == taken.source + taken.nbytes and piece.target == taken.target + taken.nbytes:  # fmt: skip
            taken = Run(taken.source, taken.target, taken.nbytes + piece.nbytes)
        else:
            pieces.appendleft(piece)
            break
    return taken


def _read_all(
    file: ModelFile, pieces: deque[Run], free: SimpleQueue, filled: SimpleQueue, direct: bool
) -> None:
    """One thread's work: the last piece of its share that nobody has taken, again and again."""
    try:
        with _open(file, direct) as source:
            while run := _take_last(pieces):
                slot = free.get()
                if slot is None:
                    break
                filled.put((_read(file, source, run, slot), run, slot))
    except Exception as error:
        filled.put(error)
    filled.put(None)


def _take_last(pieces: deque[Run]) -> Run | None:
    """The last piece, None when nothing is left; another thread may be faster at any moment."""
    try:
        return pieces.pop()
    except IndexError:
        return None


def _borrow(pinned: bool) -> torch.Tensor:
    """A slot [SLOT] uint8, at the start of a page.

    Registering memory that exists costs a fifth of what it costs to have the driver allocate pinned memory.
    """
    with _ring_lock:
        if pinned and _ring:
            return _ring.pop()
    memory = mmap.mmap(-1, SLOT)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    slot = torch.frombuffer(memory, dtype=torch.uint8)
    if pinned:
        register(slot.data_ptr(), SLOT)
    return slot


def register(address: int, nbytes: int, flags: int = 0) -> None:
    """Pin memory.

    Raises:
        TransferFailed: CUDA would not.
    """
    if code := int(torch.cuda.cudart().cudaHostRegister(address, nbytes, flags)):
        _forget_error()
        raise TransferFailed(f"CUDA would not pin {nbytes >> 20} MB (error {code})")


def unregister(address: int) -> None:
    """Undo `register`."""
    if code := int(torch.cuda.cudart().cudaHostUnregister(address)):
        _forget_error()
        log.warning("Ark igniter: CUDA would not unpin memory (error %d).", code)


def _forget_error() -> None:
    """CUDA keeps the error of a call, and would raise it at some later kernel of this thread."""
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device="cuda").add_(1)
        torch.cuda.synchronize()


def _open(file: ModelFile, direct: bool) -> FileIO:
    if direct:
        try:
            descriptor = os.open(file.path, os.O_RDONLY | os.O_DIRECT)
        except OSError:  # the file system has no such thing
            pass
        else:
            return os.fdopen(descriptor, "rb", buffering=0)
    return file.path.open("rb", buffering=0)


def _read(file: ModelFile, source: FileIO, run: Run, slot: torch.Tensor) -> torch.Tensor:
    """Read whole pages around a piece; returns the piece as a view of the slot."""
    lead = run.source % PAGE
    wanted, done = lead + run.nbytes, 0
    memory = slot.numpy().data[: -(-wanted // PAGE) * PAGE]
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
