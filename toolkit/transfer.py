"""Brings tensors of a file to a device by the best path, and says which one it took and why."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .errors import TransferFailed
from .header import ModelFile
from .layout import Layout
from .paths import PATHS

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
    """

    file: str
    path: str
    why: str
    nbytes: int
    seconds: float

    def __str__(self) -> str:
        rate = self.nbytes / max(self.seconds, 1e-9) / 1e9
        return f"{self.file}: {self.nbytes / 1e9:.2f} GB in {self.seconds:.3f} s, {rate:.1f} GB/s by {self.path} ({self.why})"


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
        advance: called with the bytes of each piece as it leaves, from any thread.

    Returns:
        The filled buffer, [layout.nbytes] uint8 on the device, and what was done.

    Raises:
        ModelFileError: the file is no longer the one whose header was read.
        TransferFailed: no path could serve; carries `{path: reason}` in its text.
    """
    file.check_unchanged()
    target = torch.empty(layout.nbytes, dtype=torch.uint8, device=device)
    reasons: dict[str, str] = {}
    for path in PATHS.values():
        reason = path.unavailable(file, device)
        if reason is None:
            start = time.perf_counter()
            try:
                path.copy(file, layout, target, _locked(advance))
            except TransferFailed as error:
                reason = str(error)
            else:
                file.check_unchanged()  # so no byte belongs to another state of the file
                why = (
                    "; ".join(f"{name}: {text}" for name, text in reasons.items()) or "first choice"
                )
                report = TransferReport(
                    file.path.name, path.name, why, layout.nbytes, time.perf_counter() - start
                )
                log.info("Ark igniter: %s", report)
                return target, report
        reasons[path.name] = reason
    raise TransferFailed("; ".join(f"{name}: {text}" for name, text in reasons.items()))


def _locked(advance: Callable[[int], None]) -> Callable[[int], None]:
    lock = threading.Lock()

    def one_at_a_time(nbytes: int) -> None:
        with lock:
            advance(nbytes)

    return one_at_a_time
