"""The least that a run's arithmetic takes: at the rate of one large matrix product on the same device."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable

import torch

from .fused.matrix import Fp8, quantise

SIDES = {"cuda": (8192, 4096, 4096), "cpu": (1024, 1024, 1024)}  # rows, in, out; 300 MB on CUDA
RUNS = 5
log = logging.getLogger("ark")
_asked: set[tuple[torch.device, str]] = set()


def matrix_rate(device: torch.device, precision: str) -> float | None:
    """What the device's matrices can do.

    Args:
        device: to measure on, once for a process.
        precision: "fp8", or a torch dtype's name like "bfloat16".

    Returns:
        FLOP/s; None where nothing can be measured, and at the first call, so that no first image waits for it.
    """
    key = (torch.device(device), precision)
    if key not in _asked:
        _asked.add(key)
        return None
    return _measured(*key)


@functools.cache
def _measured(device: torch.device, precision: str) -> float | None:
    if device.type not in SIDES:
        return None
    rows, inner, outer = SIDES[device.type]
    generator = torch.Generator(device).manual_seed(0)  # the global one is others'
    try:
        dtype = torch.bfloat16 if precision == "fp8" else getattr(torch, precision)
        x = torch.rand(rows, inner, generator=generator, device=device).to(dtype)
        weight = torch.rand(outer, inner, generator=generator, device=device).to(dtype)
        if precision == "fp8" and device.type == "cuda":
            matrix, quantised = Fp8.of(weight, quantise), quantise(x)
            seconds = min(_seconds(device, lambda: matrix(quantised)) for _ in range(RUNS))
        else:
            seconds = min(_seconds(device, lambda: x @ weight.t()) for _ in range(RUNS))
    except RuntimeError as error:
        # out of memory is one, too: a figure to show is worth nobody's picture
        log.debug("Ark: the rate of matrices could not be measured (%s).", error)
        return None
    return 2 * rows * inner * outer / seconds


def _seconds(device: torch.device, run: Callable[[], object]) -> float:
    if device.type != "cuda":
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.device(device):
        start.record()
        run()
        end.record()
        end.synchronize()
    return start.elapsed_time(end) / 1e3
