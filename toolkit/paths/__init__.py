"""The ways by which a file's bytes reach a device, behind one signature; each says why it cannot serve, if so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..header import ModelFile
from ..layout import Layout
from ..storage import Storage
from . import mmap_pin, stream


@dataclass(frozen=True)
class TransferPath:
    """One way.

    Attributes:
        name: what the report calls it.
        expected: share of the link's rate that it reaches where it serves well; decides until it was measured.
        unavailable: why it cannot bring this file to this device, or None.
        ready: whether a layout's bytes are prepared for it already, so that nothing but the link holds them up.
        stays: whether what it did once makes it ready for the next time.
        copy: fills a flat buffer [layout.nbytes] uint8 on the device and returns when it is filled; calls `advance`
            with the bytes of each piece. Raises TransferFailed (another path may serve) or
            ModelFileError (none can).
    """

    name: str
    expected: float
    unavailable: Callable[[ModelFile, torch.device, Storage], str | None]
    ready: Callable[[ModelFile, Layout], bool]
    stays: bool
    copy: Callable[[ModelFile, Layout, torch.Tensor, Storage, Callable[[int], None]], None]


PATHS = {
    path.name: path
    for path in (
        TransferPath(
            "mmap_pin", 0.75, mmap_pin.unavailable, mmap_pin.is_pinned, True, mmap_pin.copy
        ),
        TransferPath("stream", 0.45, stream.unavailable, lambda *_: False, False, stream.copy),
    )
}
