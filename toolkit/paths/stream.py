"""Many threads read pieces of the file into pinned memory, each piece copied to the device while the next one is read."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from ..errors import ModelFileError
from ..header import ModelFile
from ..layout import Layout, Run

THREADS = 16
CHUNK = 8 << 20  # bytes a read; with two slots a thread the ring holds 256 MB
_ring: list[
    torch.Tensor
] = []  # pinned slots [CHUNK] uint8, kept for the next load: pinning takes longer than reading
_ring_lock = threading.Lock()


def unavailable(file: ModelFile, device: torch.device) -> str | None:
    """Why this path cannot serve, or None."""
    return None if device.type in ("cuda", "cpu") else f"{device.type} has no pinned copies"


def copy(
    file: ModelFile, layout: Layout, target: torch.Tensor, advance: Callable[[int], None]
) -> None:
    """Fill a flat buffer; see `TransferPath.copy`."""
    chunks, number = list(layout.chunks(CHUNK)), itertools.count()

    def take() -> Run | None:
        index = next(number)  # one step of a count is atomic
        return chunks[index] if index < len(chunks) else None

    work = _fill_memory if target.device.type == "cpu" else _fill_device
    count = max(1, min(THREADS, len(chunks)))
    with ThreadPoolExecutor(count, "ark-stream") as pool:
        workers = [pool.submit(work, file, target, take, advance) for _ in range(count)]
    for worker in workers:
        worker.result()


def _fill_memory(file: ModelFile, target: torch.Tensor, take: Callable, advance: Callable) -> None:
    memory = memoryview(target.numpy())
    with file.path.open("rb", buffering=0) as source:
        while run := take():
            _read(file, source, run, memory[run.target : run.target + run.nbytes])
            advance(run.nbytes)


def _fill_device(file: ModelFile, target: torch.Tensor, take: Callable, advance: Callable) -> None:
    stream = torch.cuda.Stream(target.device)
    stream.wait_stream(torch.cuda.default_stream(target.device))
    slots = [(_borrow(), torch.cuda.Event()) for _ in range(2)]
    try:
        with file.path.open("rb", buffering=0) as source:
            for slot, copied in itertools.cycle(slots):
                if (run := take()) is None:
                    break
                copied.synchronize()
                _read(file, source, run, memoryview(slot.numpy())[: run.nbytes])
                with torch.cuda.stream(stream):
                    piece = target[run.target : run.target + run.nbytes]
                    piece.copy_(slot[: run.nbytes], non_blocking=True)
                    copied.record(stream)
                advance(run.nbytes)
    finally:
        stream.synchronize()
        with _ring_lock:
            _ring.extend(slot for slot, _ in slots)


def _borrow() -> torch.Tensor:
    with _ring_lock:
        if _ring:
            return _ring.pop()
    return torch.empty(CHUNK, dtype=torch.uint8, pin_memory=True)


def _read(file: ModelFile, source, run: Run, memory: memoryview) -> None:
    source.seek(run.source)
    done = 0
    while done < run.nbytes:
        count = source.readinto(memory[done:])
        if not count:
            raise ModelFileError(
                f"{file.path.name} ended at byte {run.source + done} while it was read.",
                "Wait until it is written completely, then queue again.",
            )
        done += count
