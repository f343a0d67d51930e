"""What a text encoder made of its prompts, kept so that it need not run again: the last ones in memory, more on disk.

A file is written whole, in the background, and holds a checksum: what is damaged, or cut off, is as good as not there.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from .cache import cache_folder
from .header import DTYPES
from .whole_file import write_whole

FOLDER = "embeddings"
SUFFIX = ".safetensors"
IN_MEMORY = 256 << 20  # bytes, 16 prompts of Klein 4B
ON_DISK = 1.0  # GB, 64 prompts, unless ARK_EMBEDDINGS_GB says otherwise
WAITING = 8  # prompts at most that are still to be written
LATER = 0.1  # s; by then the sampler waits for the card, and whoever needs the interpreter disturbs nobody
PATIENCE = 30.0  # s for a result that another thread makes
FORGOTTEN = 3600.0  # s after which a draft belongs to nobody
CHECKSUM = "crc32"
NAMES = {dtype: name for name, dtype in DTYPES.items()}
Tensors = dict[str, torch.Tensor]
log = logging.getLogger("ark")


class Embeddings:
    """The results of one text encoder by key.

    Args:
        encoder: names it and all that its results depend on beside the prompt; a part of a path.
        in_memory: bytes at most.
        on_disk: bytes at most, of all encoders together; None for what the user set.
    """

    def __init__(self, encoder: str, in_memory: int = IN_MEMORY, on_disk: int | None = None):
        self.root = cache_folder() / FOLDER
        self.folder = self.root / encoder
        self.in_memory, self.on_disk = in_memory, disk_limit() if on_disk is None else on_disk
        self._recent: OrderedDict[str, Tensors] = OrderedDict()
        self._lock = threading.Lock()
        self._writer: futures.ThreadPoolExecutor | None = None
        self._writing: list[futures.Future] = []
        self._coming: dict[str, threading.Event] = {}
        self._complained = False

    def recent(self, key: str) -> Tensors | None:
        """What is in memory, by reference: not to be written to."""
        with self._lock:
            if key in self._recent:
                self._recent.move_to_end(key)
            return self._recent.get(key)

    def saved(self, key: str) -> Tensors | None:
        """What is on disk, on the CPU; in memory from now on."""
        path = self._path(key)
        try:
            tensors = load(path.read_bytes()) if self.on_disk else None
        except (OSError, SafetensorError, ValueError, KeyError):
            return None  # it is written anew
        if tensors is None or int(tensors.pop(CHECKSUM, torch.tensor(-1))) != checksum(tensors):
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # what is used stays
        self._remember(key, tensors)
        return tensors

    def is_saved(self, key: str) -> bool:
        """Whether it is on disk."""
        return bool(self.on_disk) and self._path(key).exists()

    @contextlib.contextmanager
    def coming(self, key: str) -> Iterator[None]:
        """Whoever wants this result meanwhile waits for it, see `wait_for`."""
        done = self._coming[key] = threading.Event()
        try:
            yield
        finally:
            self._coming.pop(key, None)
            done.set()

    def wait_for(self, key: str) -> None:
        """Wait if a result is being made by another thread; it may fail to come."""
        if (coming := self._coming.get(key)) is not None:
            coming.wait(PATIENCE)

    def any_saved(self) -> bool:
        """Whether some prompt of this encoder is on disk."""
        return bool(self.on_disk) and any(self.folder.glob(f"*{SUFFIX}"))

    def keep(self, key: str, tensors: Tensors, lasting: bool = True) -> None:
        """Keep a result.

        Args:
            key: a part of a file's name.
            tensors: the result; nobody writes to them any more.
            lasting: on disk, too.
        """
        self._remember(key, tensors)
        with self._lock:  # the next prompt's text comes from another thread
            self._writing = [write for write in self._writing if not write.done()]
            if len(self._writing) < WAITING:
                # its thread is waited for when the process ends
                self._writer = self._writer or futures.ThreadPoolExecutor(1, "ark-embeddings")
                self._writing.append(self._writer.submit(self._settle, key, tensors, lasting))

    def settle(self) -> None:
        """Wait until everything is where it will stay."""
        futures.wait(self._writing)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{SUFFIX}"

    def _remember(self, key: str, tensors: Tensors) -> None:
        with self._lock:
            self._recent[key] = tensors
            self._recent.move_to_end(key)
            while sum(map(_nbytes, self._recent.values())) > self.in_memory and self._recent:
                self._recent.popitem(last=False)

    def _settle(self, key: str, tensors: Tensors, lasting: bool) -> None:
        """In the background: on disk."""
        if lasting and self.on_disk:
            time.sleep(LATER)
            self._write(key, tensors)

    def _write(self, key: str, tensors: Tensors) -> None:
        try:
            tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
            if not all(tensor.isfinite().all() for tensor in tensors.values()):
                return  # something failed: the next start shall not inherit it
            pieces = in_pieces({**tensors, CHECKSUM: torch.tensor(checksum(tensors))})
            nbytes = sum(map(len, pieces))
            make_room(self.root, self.on_disk - nbytes)
            if nbytes <= self.on_disk:
                self.folder.mkdir(parents=True, exist_ok=True)
                write_whole(self._path(key), *pieces)
        except OSError as error:
            if not self._complained:
                self._complained = True
                log.warning("Ark: embeddings are not kept in %s (%s). Free some space there, or set ARK_CACHE_DIR to another folder, or ARK_EMBEDDINGS_GB=0.", self.root, error)  # fmt: skip


def make_room(root: Path, limit: int) -> None:
    """Delete what was not used for longest until the files of a folder have `limit` bytes at most, and old drafts.

    Another process may do the same at the same time.
    """
    found = []
    for path in root.glob("*/*"):
        with contextlib.suppress(OSError):
            stat = path.stat()
            if path.suffix == SUFFIX:
                found.append((stat.st_mtime, stat.st_size, path))
            elif path.suffix == ".part" and time.time() - stat.st_mtime > FORGOTTEN:
                path.unlink()
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= limit:
            break
        with contextlib.suppress(OSError):  # gone already, or open where that matters
            path.unlink(missing_ok=True)
            total -= size


def in_pieces(tensors: Tensors) -> list[bytes | memoryview]:
    """What a safetensors file of them holds, without a copy: the library holds the interpreter while it makes some.

    Args:
        tensors: on the CPU.

    Source: the format's description in the README of huggingface/safetensors.
    """
    header, start, data = {}, 0, []
    # as the library does: those of the largest numbers first, so that each begins at a multiple of its own
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0])):
        data.append(_bytes(tensor))
        span = [start, start := start + tensor.nbytes]
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}  # fmt: skip
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little"), text, *data]


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


def checksum(tensors: Tensors) -> int:
    """CRC-32 of names, shapes and bytes; CPU tensors."""
    found = 0
    for name, tensor in sorted(tensors.items()):
        found = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), found)
        found = zlib.crc32(_bytes(tensor), found)
    return found


def disk_limit() -> int:
    """Bytes for all embeddings on disk: ARK_EMBEDDINGS_GB, 0 for none, else 1 GB."""
    chosen = os.environ.get("ARK_EMBEDDINGS_GB", "")
    try:
        limit = float(chosen) if chosen else ON_DISK
        if not (math.isfinite(limit) and limit >= 0):
            raise ValueError(chosen)
    except ValueError:
        log.warning("Ark: ARK_EMBEDDINGS_GB=%s is not a number of gigabytes; it is ignored.", chosen)  # fmt: skip
        limit = ON_DISK
    return int(limit * 1e9)


def _nbytes(tensors: Tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())
