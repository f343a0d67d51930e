"""A read-only mapping of the file, pinned window by window, each copied while the next one is being pinned.

The mapping stays pinned, so that a model which was unloaded comes back at the speed of the link, out of the page cache and
with no second copy in memory. What may be pinned in all is limited.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sys
import threading
from collections import OrderedDict, deque
from collections.abc import Callable

import torch

from ..errors import TransferFailed
from ..header import ModelFile
from ..layout import Layout
from ..storage import Storage

WINDOW = 256 << 20  # bytes
READ_ONLY = 8  # cudaHostRegisterReadOnly
SHARE = 0.5  # of the machine's memory that may be pinned, unless ARK_PIN_LIMIT_GB says otherwise
_pinned: OrderedDict[tuple, PinnedMapping] = OrderedDict()  # by identity, last used at the end
_lock = threading.Lock()  # one load at a time has the link, and the table of mappings
_forgotten: deque[tuple] = deque()  # identities to unpin when the lock is free


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

    def pin(self, window: int) -> None:
        """Register one window; nothing happens if it already is."""
        if window in self.windows:
            return
        start, end = window * WINDOW, min((window + 1) * WINDOW, len(self.map))
        size = -(-(end - start) // mmap.PAGESIZE) * mmap.PAGESIZE
        code = torch.cuda.cudart().cudaHostRegister(self.bytes.data_ptr() + start, size, READ_ONLY)
        if int(code):
            raise TransferFailed(
                f"CUDA would not pin {size >> 20} MB of the mapping (error {int(code)})"
            )
        self.windows.add(window)

    @property
    def pinned_bytes(self) -> int:
        """How much of the file is registered."""
        return min(len(self.windows) * WINDOW, len(self.map))

    def close(self) -> None:
        """Unregister everything; the pages go back to the page cache's own judgement."""
        for window in self.windows:
            torch.cuda.cudart().cudaHostUnregister(self.bytes.data_ptr() + window * WINDOW)
        self.windows.clear()


def _writable_alias(mapped: mmap.mmap) -> ctypes.Array:
    """The mapping's memory as a ctypes array, which torch takes without a warning; it is only ever read."""
    import numpy

    view = numpy.frombuffer(mapped, dtype=numpy.uint8)
    alias = (ctypes.c_uint8 * len(mapped)).from_address(view.ctypes.data)
    alias.owner = view  # keeps the mapping alive
    return alias


def pin_limit() -> int:
    """How many bytes may be pinned in all: ARK_PIN_LIMIT_GB, else half of the machine's memory."""
    if chosen := os.environ.get("ARK_PIN_LIMIT_GB"):
        with contextlib.suppress(ValueError):
            return int(float(chosen) * 1e9)
    return int(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * SHARE)


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
        stream = torch.cuda.Stream(target.device)
        stream.wait_stream(torch.cuda.default_stream(target.device))
        try:
            with torch.cuda.stream(stream):
                for run in layout.chunks(WINDOW):
                    for window in range(
                        run.source // WINDOW, (run.source + run.nbytes - 1) // WINDOW + 1
                    ):
                        mapping.pin(window)
                        start = max(run.source, window * WINDOW)
                        end = min(run.source + run.nbytes, (window + 1) * WINDOW)
                        at = run.target + start - run.source
                        target[at : at + end - start].copy_(
                            mapping.bytes[start:end], non_blocking=True
                        )
                        advance(end - start)
        finally:
            stream.synchronize()
            _unpin_forgotten()


def _mapping(file: ModelFile) -> PinnedMapping:
    """The file's mapping, the oldest ones given up where the limit needs it."""
    for stale in [key for key in _pinned if key[:2] == file.identity[:2] and key != file.identity]:
        _pinned.pop(stale).close()
    mapping = _pinned.pop(file.identity, None) or PinnedMapping(file)
    while (
        _pinned and file.size + sum(other.pinned_bytes for other in _pinned.values()) > pin_limit()
    ):
        _pinned.popitem(last=False)[1].close()
    _pinned[file.identity] = mapping
    return mapping


def forget(identity: tuple) -> None:
    """Unpin a file that no model needs any more: at once, or when the load that is going on has ended.

    Called by the garbage collector, at any moment and in any thread, also in the one that is loading.
    """
    _forgotten.append(identity)
    while _forgotten and _lock.acquire(blocking=False):
        try:
            _unpin_forgotten()
        finally:
            _lock.release()


def _unpin_forgotten() -> None:
    """Close what was forgotten; the caller holds the lock."""
    while _forgotten:
        if mapping := _pinned.pop(_forgotten.popleft(), None):
            mapping.close()
