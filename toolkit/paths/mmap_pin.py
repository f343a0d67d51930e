"""A read-only mapping of the file, pinned window by window, each copied while the next one is being pinned.

Pinning is a little slower than the link, so a few threads read the end of the file in the meantime.

The mapping stays pinned, so that a model which was unloaded comes back at the speed of the link, out of the page cache and
with no second copy in memory. What may be pinned in all is limited.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import sys
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from typing import Any

import torch

from ..errors import TransferFailed
from ..header import ModelFile
from ..layout import Layout, Run
from ..storage import Storage, probe_storage, total_memory
from .pump import pump, register, unregister

WINDOW = 128 << 20  # bytes
THREADS = 4  # more of them hold the pinning up
READ_ONLY = 8  # cudaHostRegisterReadOnly
LEISURE = 2.0  # s until what came by another path begins to be pinned
PAUSE = 0.01  # s between two windows then
SHARE = 0.5  # of the machine's memory that may be pinned, unless ARK_PIN_LIMIT_GB says otherwise
_pinned: OrderedDict[tuple, PinnedMapping] = OrderedDict()  # by identity, last used at the end
log = logging.getLogger("ark")
_lock = threading.Lock()  # one load at a time has the link, and the table of mappings
_holders: Counter[tuple] = Counter()  # how many models need a file
# identities with one holder more (1) or less (-1), to be counted when the lock is free
_news: deque[tuple[tuple, int]] = deque()
_forbidden = False


class PinnedMapping:
    """One file's mapping and the windows of it that are registered with CUDA."""

    def __init__(self, file: ModelFile):
        try:
            with file.path.open("rb") as source:
                self.map = mmap.mmap(source.fileno(), file.size, mmap.MAP_SHARED, mmap.PROT_READ)
        except (OSError, ValueError) as error:
            raise TransferFailed(f"the file cannot be mapped ({error})") from error
        self.bytes = torch.frombuffer(_writable_alias(self.map), dtype=torch.uint8)
        self.windows: set[int] = set()
        self.whole = False  # registered in one piece

    def pinned_pieces(self, run: Run) -> list[tuple[torch.Tensor, Run]]:
        """Register the windows that a run lies in; returns its bytes, one tensor a window, as CUDA wants them."""
        pieces = []
        for window in windows_of(run):
            self.pin(window)
            start = max(run.source, window * WINDOW)
            end = min(run.source + run.nbytes, (window + 1) * WINDOW)
            part = Run(start, run.target + start - run.source, end - start)
            pieces.append((self.bytes[start:end], part))
        return pieces

    def pin(self, window: int) -> None:
        """Register one window; nothing happens if it already is."""
        if window not in self.windows:
            start, end = window * WINDOW, min((window + 1) * WINDOW, len(self.map))
            register(self.bytes.data_ptr() + start, _whole_pages(end - start), READ_ONLY)
            self.windows.add(window)

    @property
    def pinned_bytes(self) -> int:
        """How much of the file is registered."""
        return min(len(self.windows) * WINDOW, len(self.map))

    def pin_whole(self) -> None:
        """Register the file in one piece: what copies tensor by tensor must not meet a seam."""
        if not self.whole:
            self.close()
            register(self.bytes.data_ptr(), _whole_pages(len(self.map)), READ_ONLY)
            self.windows, self.whole = set(range(-(-len(self.map) // WINDOW))), True

    def close(self) -> None:
        """Unregister everything; the pages go back to the page cache's own judgement."""
        for window in {0} if self.whole else self.windows:
            unregister(self.bytes.data_ptr() + window * WINDOW)
        self.windows, self.whole = set(), False


def _whole_pages(nbytes: int) -> int:
    return -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE


def _writable_alias(mapped: mmap.mmap) -> ctypes.Array:
    """The mapping's memory as a ctypes array, which torch takes without a warning; it is only ever read."""
    import numpy

    view = numpy.frombuffer(mapped, dtype=numpy.uint8)
    alias: Any = (ctypes.c_uint8 * len(mapped)).from_address(view.ctypes.data)
    alias.owner = view  # keeps the mapping alive
    return alias


def forbid() -> None:
    """Pin nothing from now on: the user does not want pinned memory."""
    global _forbidden
    _forbidden = True


def pin_limit() -> int:
    """How many bytes may be pinned in all: ARK_PIN_LIMIT_GB, else half of the memory that this process may use."""
    if _forbidden:
        return 0
    if chosen := os.environ.get("ARK_PIN_LIMIT_GB"):
        try:
            return int(float(chosen) * 1e9)
        except (ValueError, OverflowError):
            log.warning(
                "Ark: ARK_PIN_LIMIT_GB=%s is not a number of gigabytes; it is ignored.", chosen
            )
    return int(total_memory() * SHARE)


def pinned() -> int:
    """How many bytes of files are pinned now."""
    return sum(mapping.pinned_bytes for mapping in list(_pinned.values()))


def unavailable(file: ModelFile, device: torch.device, storage: Storage) -> str | None:
    """Why this path cannot serve, or None."""
    if device.type != "cuda" or torch.version.cuda is None:
        return f"pins for NVIDIA GPUs only, this is {device.type}"
    if not sys.platform.startswith("linux"):
        return f"{sys.platform} cannot pin a mapped file"
    if storage.network:
        return f"the file lies on a network drive ({storage.filesystem}), where mapping is slow"
    if not storage.warm:
        return f"only {storage.cached:.0%} of the file is in memory, and reading is faster than mapping"
    if file.size > pin_limit():
        return f"{file.size / 1e9:.1f} GB are more than the {pin_limit() / 1e9:.1f} GB that may be pinned (ARK_PIN_LIMIT_GB)"
    return None


def is_pinned(file: ModelFile, layout: Layout) -> bool:
    """Whether every byte of a layout is pinned."""
    mapping = _pinned.get(file.identity)
    return mapping is not None and all(
        mapping.windows.issuperset(windows_of(run)) for run in layout.runs
    )


def windows_of(run: Run) -> range:
    """The windows that a run's bytes lie in."""
    return range(run.source // WINDOW, (run.source + run.nbytes - 1) // WINDOW + 1)


def copy(
    file: ModelFile,
    layout: Layout,
    target: torch.Tensor,
    storage: Storage,
    advance: Callable[[int], None],
) -> None:
    """Fill a flat buffer; see `TransferPath.copy`."""
    with _lock:
        mapping = _mapping(file)
        threads = 0 if is_pinned(file, layout) else THREADS
        try:
            pump(file, layout, target, advance, threads=threads, mapping=mapping)
        finally:
            _settle()


def pin_at_leisure(
    file: ModelFile, layout: Layout, device: torch.device, user: Callable[[], object]
) -> None:
    """Pin what came by another path, so that it comes back at the speed of the link.

    It is done in the background, a window at a time, so that whoever uses the device hardly notices.

    Args:
        file: which one.
        layout: what to pin of it.
        device: for which.
        user: answers None when nobody needs the file any more (a weak reference).
    """

    def work() -> None:
        if unavailable(file, device, probe_storage(file)):
            return
        for window in sorted({window for run in layout.runs for window in windows_of(run)}):
            with _lock:
                try:
                    others = pinned() - (_pinned[file.identity].pinned_bytes if file.identity in _pinned else 0)  # fmt: skip
                    if user() is None or file.size + others > pin_limit():
                        return
                    _mapping(file).pin(window)
                except TransferFailed as error:
                    log.info("Ark igniter: %s is not pinned (%s).", file.path.name, error)
                    return
                finally:
                    _settle()
            time.sleep(PAUSE)

    if device.type == "cuda":
        timer = threading.Timer(LEISURE, work)
        timer.daemon = True
        timer.start()


def pinned_bytes(file: ModelFile, device: torch.device) -> torch.Tensor | None:
    """A file's bytes, [size] uint8, pinned in one piece for a device; read-only memory. None where that cannot be.

    Raises:
        ModelFileError: the file is no longer the one whose header was read.
    """
    if unavailable(file, device, probe_storage(file)):
        return None
    with _lock:
        try:
            mapping = _mapping(file)
            file.check_unchanged()  # so the bytes belong to the header
            mapping.pin_whole()
        except TransferFailed as error:
            log.warning("Ark igniter: %s is not pinned (%s).", file.path.name, error)
            return None
        finally:
            _settle()
        return mapping.bytes


def _mapping(file: ModelFile) -> PinnedMapping:
    """The file's mapping, the oldest ones given up where the limit needs it."""
    for stale in [key for key in _pinned if key[:2] == file.identity[:2] and key != file.identity]:
        _pinned.pop(stale).close()
    mapping = _pinned.pop(file.identity, None) or PinnedMapping(file)
    while _pinned and file.size + pinned() > pin_limit():
        _pinned.popitem(last=False)[1].close()
    _pinned[file.identity] = mapping
    return mapping


def hold(identity: tuple) -> None:
    """Say that a model needs a file; `forget` takes it back."""
    _news.append((identity, 1))


def forget(identity: tuple) -> None:
    """Say that a model needs a file no more: without any, it is unpinned, at once or when the load that is going on has ended.

    Called by the garbage collector, at any moment and in any thread, also in the one that is loading.
    """
    _news.append((identity, -1))
    while _news and _lock.acquire(blocking=False):
        try:
            _settle()
        finally:
            _lock.release()


def _settle() -> None:
    """Unpin what nobody holds; the caller has the lock."""
    while _news:
        identity, change = _news.popleft()
        _holders[identity] += change
        if _holders[identity] <= 0:
            del _holders[identity]
            if change < 0 and (mapping := _pinned.pop(identity, None)):
                mapping.close()
