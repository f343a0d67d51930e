"""How fast a disk reads: a bounded piece of a real file, past the page cache where the file system allows it.

Importing this needs nothing but Python.
"""

from __future__ import annotations

import itertools
import mmap
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

THREADS = 16
STEP = 8 << 20  # bytes of one read
BOUND, SECONDS = 512 << 20, 3.0  # what a short look reads at most
MANY = 20_000  # files that are looked at
WHOLE = 1 << 30  # bytes; a Klein of 4B or 9B has more


@dataclass(frozen=True)
class ReadSpeed:
    """What reading took.

    Attributes:
        nbytes: read.
        seconds: that it took.
        direct: whether it went past the page cache.
    """

    nbytes: int
    seconds: float
    direct: bool

    @property
    def rate(self) -> float:
        """Bytes/s."""
        return self.nbytes / max(self.seconds, 1e-9)


def read_speed(path: Path, nbytes: int = BOUND, seconds: float = SECONDS) -> ReadSpeed:
    """Read from the start of a file with many reads in flight; nothing is done with the bytes.

    Args:
        path: the file.
        nbytes: read at most.
        seconds: after which no further read begins.
    """
    size = min(path.stat().st_size, nbytes)
    numbers, start = itertools.count(), time.perf_counter()

    def work(flags: int) -> int:
        done, buffer = 0, mmap.mmap(-1, STEP)  # begins at a page, as O_DIRECT wants
        with os.fdopen(os.open(path, flags), "rb", buffering=0) as source:
            while (offset := next(numbers) * STEP) < size:
                if time.perf_counter() - start > seconds:
                    break
                source.seek(offset)
                done += source.readinto(buffer) or 0
        return done

    def read(flags: int) -> int:
        with ThreadPoolExecutor(THREADS) as pool:
            return sum(pool.map(work, [flags] * THREADS))

    usual = os.O_RDONLY | getattr(os, "O_BINARY", 0)
    direct = hasattr(os, "O_DIRECT")
    try:
        done = read(usual | getattr(os, "O_DIRECT", 0))
    except OSError:  # the file system has no such thing
        if not direct:
            raise
        numbers, start, direct = itertools.count(), time.perf_counter(), False
        done = read(usual)
    return ReadSpeed(done, time.perf_counter() - start, direct)


def find_model(folders: Iterable[Path]) -> Path | None:
    """The file to look at: the largest safetensors file, a whole Klein before others; None if there is none."""
    files = itertools.islice((f for folder in folders for f in folder.rglob("*")), MANY)
    sizes = {f: f.stat().st_size for f in files if f.suffix == ".safetensors" and f.is_file()}

    def worth(file: Path) -> tuple[bool, int]:
        return "klein" in file.name.lower() and sizes[file] >= WHOLE, sizes[file]

    return max(sizes, key=worth, default=None)
