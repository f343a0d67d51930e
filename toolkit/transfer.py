"""Brings tensors of a file to a device by the best path, and says which one it took and why."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .errors import TransferFailed
from .header import ModelFile
from .layout import Layout
from .paths import PATHS, TransferPath
from .rates import known_rates, link_rate, remember_rate
from .storage import Storage, probe_storage

STAYS = 1.5  # how much faster a path must be than one that leaves the file ready for the next time
log = logging.getLogger("ark")


@dataclass(frozen=True)
class TransferReport:
    """What one transfer did.

    Attributes:
        file: the file's name.
        path: the path taken.
        why: the reason, with those of the paths that were passed over.
        nbytes: moved.
        seconds: from the first byte asked for to the last one there.
        link: bytes/s that the device takes from pinned memory, None for a CPU.
    """

    file: str
    path: str
    why: str
    nbytes: int
    seconds: float
    link: float | None

    def __str__(self) -> str:
        rate = self.nbytes / max(self.seconds, 1e-9)
        share = f", {rate / self.link:.0%} of the link" if self.link else ""
        return (
            f"{self.file}: {self.nbytes / 1e9:.2f} GB in {self.seconds:.3f} s, {rate / 1e9:.1f} GB/s{share}, "
            f"by {self.path} ({self.why})"
        )

    def facts(self) -> dict[str, Any]:
        """As a table, with `rate` in bytes/s and `share` of the link, None for a CPU."""
        rate = self.nbytes / max(self.seconds, 1e-9)
        share = rate / self.link if self.link else None
        return {**dataclasses.asdict(self), "rate": rate, "share": share}


def transfer(
    file: ModelFile,
    layout: Layout,
    device: torch.device,
    advance: Callable[[int], None] = lambda nbytes: None,
) -> tuple[torch.Tensor, TransferReport]:
    """Bring a layout's bytes to a device.

    Args:
        file: whose bytes.
        layout: which ones, and where to.
        device: "cuda", or "cpu" for a copy in memory.
        advance: called with the bytes of each piece as it leaves.

    Returns:
        The filled buffer, [layout.nbytes] uint8 on the device, and what was done.

    Raises:
        ModelFileError: the file is no longer the one whose header was read.
        TransferFailed: no path could serve; carries `{path: reason}` in its text.
    """
    file.check_unchanged()
    storage, link = probe_storage(file), link_rate(device)
    target = torch.empty(layout.nbytes, dtype=torch.uint8, device=device)
    passed_over: dict[str, str] = {}
    for path, why in usable_paths(file, layout, device, storage, link, passed_over):
        start, fresh = time.perf_counter(), not path.ready(file, layout)
        try:
            path.copy(file, layout, target, storage, advance)
        except (TransferFailed, OSError) as error:
            passed_over[path.name] = str(error)
            continue
        seconds = time.perf_counter() - start
        file.check_unchanged()  # so no byte belongs to another state of the file
        if fresh:
            remember_rate(device, storage, path.name, layout.nbytes, seconds)
        why = with_passed_over(why, passed_over)
        report = TransferReport(file.path.name, path.name, why, layout.nbytes, seconds, link)
        log.info("Ark igniter: %s", report)
        return target, report
    raise TransferFailed("; ".join(f"{name}: {text}" for name, text in passed_over.items()))


def usable_paths(
    file: ModelFile,
    layout: Layout,
    device: torch.device,
    storage: Storage,
    link: float | None,
    passed_over: dict[str, str],
) -> Iterator[tuple[TransferPath, str]]:
    """The ranked paths that can serve, each with the reason for its place; why the others cannot goes to `passed_over`."""
    for path, why in ranked_paths(file, layout, device, storage, link):
        if (reason := path.unavailable(file, device, storage)) is None:
            yield path, why
        else:
            passed_over[path.name] = reason


def with_passed_over(why: str, passed_over: dict[str, str]) -> str:
    """A path's reason with those against the paths before it."""
    return "; ".join([why, *(f"not {name}: {text}" for name, text in passed_over.items())])


def ranked_paths(
    file: ModelFile,
    layout: Layout,
    device: torch.device,
    storage: Storage,
    link: float | None,
) -> list[tuple[TransferPath, str]]:
    """The paths, the best first: one that is ready, then by what was measured here, else by what each one promises.

    One that leaves the file ready for the next time is taken unless another is faster by a fair margin.

    Returns:
        Each with the reason for its place.
    """
    known, link = known_rates(device, storage), link or 1.0

    def rate_of(path: TransferPath) -> tuple[float, str]:
        if path.ready(file, layout):
            return float("inf"), "the file is pinned already"
        worth = STAYS if path.stays else 1.0
        if path.name in known:
            rate = known[path.name]
            return rate * worth, f"{rate / 1e9:.1f} GB/s when last measured here"
        return path.expected * link * worth, "not measured here yet"

    ranked = sorted(PATHS.values(), key=lambda path: rate_of(path)[0], reverse=True)
    return [(path, rate_of(path)[1]) for path in ranked]
