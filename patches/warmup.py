"""CUDA loads each kernel when it is first called: over half a second in the first image of a process.

So a few layers of each part, of the host's own classes and of the sizes in the file, run once with weights that nobody has
set, while the real weights are on their way. What they compute is thrown away. It is done in the thread that engines use, in
the order in which the parts are needed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import comfy.model_management
import torch

from ..toolkit import gpu_thread
from ..toolkit.combustion import select_attention_kernel
from ..toolkit.fused.runner import PRECISIONS
from ..toolkit.hardware import probe_hardware
from ..toolkit.matrices import choose_algorithms, usual_shapes
from .attention import usual_attention

DEVICES = ("cuda",)
ROOM = 8 << 30  # bytes that must be free on the device
_seen: set[Hashable] = set()
log = logging.getLogger("ark")


def warm_up(part: str, shape: Hashable, device: torch.device, run: Callable[[], object]) -> None:
    """Let a part run once in the background; nothing happens a second time, or where memory is short.

    Args:
        part: its name, for the log.
        shape: what the kernels depend on: dimensions and dtypes.
        device: the one that `run` works on.
        run: builds the layers and calls them.
    """
    if device.type not in DEVICES or (part, shape, device) in _seen:
        return
    _seen.add((part, shape, device))
    gpu_thread.submit(lambda: _run_once(part, device, run))


def settle() -> None:
    """Wait until nothing runs in the background any more."""
    gpu_thread.submit(int).result()


def unset(weights: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """Tensors of the same shapes and dtypes on a device, their values whatever lies in its memory."""
    return {key: torch.empty_like(tensor, device=device) for key, tensor in weights.items()}


def warm_up_attention(model: Any, busy: Callable[[], bool]) -> None:
    """Measure what "auto" takes for a MODEL and load its kernel in the background, unless the device is busy by then."""
    device, usual = model.load_device, usual_attention(model.model)

    def run() -> None:
        if busy():  # what is measured then says nothing
            return
        kernel, _ = select_attention_kernel("auto", probe_hardware(device), device, *usual)
        if kernel:
            q = torch.zeros(usual[0], dtype=usual[1], device=device)
            kernel.attend(q, q, q)

    warm_up("attention kernel", usual, device, run)


def choose_matrices(model: Any, busy: Callable[[], bool]) -> None:
    """Measure which algorithms multiply by a MODEL's matrices, once a card, unless memory is short; see `toolkit/matrices.py`."""
    device, dtype = model.load_device, usual_attention(model.model)[1]
    if device.type != "cuda" or dtype is not torch.bfloat16 or torch.cuda.mem_get_info(device)[0] < ROOM:  # fmt: skip
        return
    for precision in PRECISIONS:
        shapes = usual_shapes(model.model.diffusion_model.hidden_size)
        choose_algorithms(device, shapes, precision, busy)


def _run_once(part: str, device: torch.device, run: Callable[[], object]) -> None:
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < ROOM:
        return
    try:
        with torch.inference_mode():
            run()
    except comfy.model_management.InterruptProcessingException:
        # it was meant for the prompt
        comfy.model_management.interrupt_current_processing(True)
    except Exception as error:  # the prompt will show whether it matters
        log.warning("Ark: the %s could not be warmed up (%s).", part, error)
