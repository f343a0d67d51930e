"""How fast each path was on this machine: measured as it is used, remembered for the next time."""

from __future__ import annotations

import functools

import torch

from .notebook import recall, remember
from .storage import Storage

BOOK = "transfer_rates"
WORTH_RECORDING = 2 << 30  # bytes; smaller transfers say little
PROBE = 32 << 20  # bytes of one copy that measures the link


@functools.lru_cache
def link_rate(device: torch.device) -> float | None:
    """Rate of copies from pinned memory to a device in bytes/s, measured once and remembered; None for a CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    if known := _rates(name).get("link"):
        return known
    with torch.cuda.device(device):
        rate = _measure(device)
    _remember(name, "link", rate)
    return rate


def _measure(device: torch.device) -> float:
    source = torch.empty(PROBE, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(PROBE, dtype=torch.uint8, device=device)
    target.copy_(source)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(4):
        target.copy_(source, non_blocking=True)
    end.record()
    end.synchronize()
    return 4 * PROBE / (start.elapsed_time(end) * 1e-3)


def _key(device: torch.device, storage: Storage) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{name} from {storage.device} {'warm' if storage.warm else 'cold'}"


def known_rates(device: torch.device, storage: Storage) -> dict[str, float]:
    """Rates in bytes/s by path, as remembered for this device and storage."""
    return _rates(_key(device, storage))


def remember_rate(
    device: torch.device, storage: Storage, path: str, nbytes: int, seconds: float
) -> None:
    """Write a path's rate down, the mean of it and the one before; a folder that cannot be written costs only the memory."""
    if nbytes >= WORTH_RECORDING and seconds > 0:
        rate, key = nbytes / seconds, _key(device, storage)
        _remember(key, path, (rate + _rates(key).get(path, rate)) / 2)


def _rates(key: str) -> dict[str, float]:
    try:
        return {name: float(rate) for name, rate in recall(BOOK, key).items() if float(rate) > 0}
    except (ValueError, TypeError, AttributeError):  # none yet, or not ours
        return {}


def _remember(key: str, name: str, rate: float) -> None:
    remember(BOOK, key, {**_rates(key), name: round(rate)})
