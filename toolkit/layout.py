"""Where a file's tensors go in one flat buffer on the device, and in which pieces their bytes travel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from .header import TensorEntry

ALIGNMENT = 256  # bytes; what torch's own allocator gives each tensor
Key = TypeVar("Key")  # what tensors are known by: names, or their first bytes in the file
KEEP = 16  # bytes; the alignment that matrix kernels need, below which a tensor starts a new run


@dataclass(frozen=True)
class Run:
    """Bytes that lie together in the file and in the buffer.

    Attributes:
        source: first byte in the file.
        target: first byte in the buffer.
        nbytes: how many.
    """

    source: int
    target: int
    nbytes: int


@dataclass(frozen=True)
class Layout(Generic[Key]):
    """A flat buffer for some tensors of one file.

    Attributes:
        nbytes: of the buffer.
        entries: the tensors by name.
        offsets: first byte of each in the buffer.
        runs: what to copy, in the order of the file.
    """

    nbytes: int
    entries: Mapping[Key, TensorEntry]
    offsets: Mapping[Key, int]
    runs: tuple[Run, ...]

    def views(self, flat: torch.Tensor) -> dict[Key, torch.Tensor]:
        """The tensors as views of the filled buffer [nbytes] uint8."""
        return {
            name: flat[start : start + entry.nbytes].view(entry.dtype).view(entry.shape)
            for name, entry in self.entries.items()
            for start in (self.offsets[name],)
        }

    def chunks(self, size: int) -> Iterator[Run]:
        """The runs cut into pieces of at most `size` bytes."""
        for run in self.runs:
            for done in range(0, run.nbytes, size):
                yield Run(run.source + done, run.target + done, min(size, run.nbytes - done))


def plan_layout(entries: Mapping[Key, TensorEntry]) -> Layout[Key]:
    """Lay tensors out in the order of their bytes, neighbours together, each aligned.

    Args:
        entries: any tensors of one file, by any names.

    Returns:
        The layout; of a whole file with well aligned tensors it has one run.
    """
    ordered = sorted(entries.items(), key=lambda item: item[1].start)
    offsets: dict[Key, int] = {}
    runs: list[Run] = []
    for name, entry in ordered:
        last = runs[-1] if runs else Run(0, 0, 0)
        end = last.target + last.nbytes
        together = runs and entry.start == last.source + last.nbytes and end % KEEP == 0
        if together:
            runs[-1] = Run(last.source, last.target, last.nbytes + entry.nbytes)
        else:
            end = -(-end // ALIGNMENT) * ALIGNMENT
            runs.append(Run(entry.start, end, entry.nbytes))
        offsets[name] = end
    nbytes = runs[-1].target + runs[-1].nbytes if runs else 0
    return Layout(nbytes, dict(ordered), offsets, tuple(run for run in runs if run.nbytes))
