"""A GPU's libraries are loaded while somebody waits for something else: CUDA does it at the first call of each, for seconds."""

from __future__ import annotations

import logging
from concurrent.futures import Future

import torch
import torch.nn.functional as F

from .fused.runner import operations_for
from .gpu_thread import submit

DEVICES = ("cuda",)
log = logging.getLogger("ark")


def wake(device: torch.device, dtype: torch.dtype) -> Future | None:
    """Multiply, convolve and attend to next to nothing, in the background; nothing happens on a CPU.

    Args:
        device: that a model is going to run on.
        dtype: that it will be computed in.
    """
    return submit(lambda: _wake(device, dtype)) if device.type in DEVICES else None


def _wake(device: torch.device, dtype: torch.dtype) -> None:
    try:
        with torch.inference_mode():
            operations_for(device)
            x = torch.zeros(1, 128, 32, 32, dtype=dtype, device=device)
            x = x.contiguous(memory_format=torch.channels_last)
            weight = torch.zeros(128, 128, 3, 3, dtype=dtype, device=device)
            F.conv2d(x, weight.contiguous(memory_format=torch.channels_last), padding=1)
            q = x.flatten(2).mT.unsqueeze(1)  # [1, 1, 1024, 128]
            F.scaled_dot_product_attention(q, q, q)
            F.linear(q, weight[:, :, 0, 0])
    except Exception as error:  # the first picture will show whether it matters
        log.warning("Ark: the GPU could not be woken (%s).", error)
