"""Where a file lies and how much of it is in memory already: what decides how it is best read."""

from __future__ import annotations

import mmap
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from .header import ModelFile

NETWORK = ("nfs", "cifs", "smb", "9p", "ceph", "glusterfs", "fuse.", "virtiofs", "afs", "ncpfs")
PROBES = 32  # pages looked at


@dataclass(frozen=True)
class Storage:
    """What is known of a file's place.

    Attributes:
        filesystem: the kernel's name for it, "unknown" where that cannot be asked.
        device: the storage device, "major:minor".
        network: whether its bytes come over a network.
        cached: share of the file in the page cache, 0 to 1; None where that cannot be asked.
    """

    filesystem: str
    device: str
    network: bool
    cached: float | None

    @property
    def warm(self) -> bool:
        """Whether reading it needs (almost) no disk; a file of which that is unknown counts as warm."""
        return self.cached is None or self.cached > 0.95


def probe_storage(file: ModelFile) -> Storage:
    """Look at a file's place; reads nothing from the disk."""
    number = file.identity[0]
    device = f"{os.major(number)}:{os.minor(number)}" if hasattr(os, "major") else str(number)
    filesystem = _filesystem(device)
    network = filesystem.startswith(NETWORK) or str(file.path).startswith("\\\\")
    return Storage(filesystem, device, network, None if network else _cached_share(file))


def _filesystem(device: str) -> str:
    """The type of the file system on a device, from the kernel's table of mounts."""
    if not sys.platform.startswith("linux"):
        return "unknown"
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "unknown"
    for line in lines:  # id parent major:minor root point options ... - type source options
        before, _, after = line.partition(" - ")
        if before.split()[2] == device:
            return after.split()[0]
    return "unknown"


def _cached_share(file: ModelFile) -> float | None:
    """Ask for pages spread over the file without waiting for the disk: those that come were in memory."""
    if not hasattr(os, "RWF_NOWAIT"):
        return None
    page, found = bytearray(mmap.PAGESIZE), 0
    last = max(0, file.size - len(page))
    try:
        with file.path.open("rb", buffering=0) as source:
            for probe in range(PROBES):
                offset = last * probe // max(1, PROBES - 1) // len(page) * len(page)
                try:
                    found += os.preadv(source.fileno(), [page], offset, os.RWF_NOWAIT) > 0
                except BlockingIOError:
                    continue
    except OSError:  # the file system cannot say
        return None
    return found / PROBES


def available_memory() -> int | None:
    """Bytes that programs can still take without swapping, None where that cannot be asked."""
    return _memory("MemAvailable:")


def total_memory() -> int:
    """Bytes of memory that this process may use: the machine's, or its container's; 0 where that cannot be asked."""
    limits = [_memory("MemTotal:") or 0]
    for place in (
        "memory.max",
        "memory/memory.limit_in_bytes",
    ):  # control groups, second and first version
        try:
            limits.append(int(Path("/sys/fs/cgroup", place).read_text(encoding="ascii")))
        except (OSError, ValueError):  # none, or "max"
            continue
    return min(limits)


def _memory(entry: str) -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith(entry):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
