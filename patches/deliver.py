"""Tensors between a GPU and the host's memory, at the speed of the link, which takes pinned memory.

It is borrowed: the host keeps results for as long as it likes, and to pin memory anew for each takes longer than to copy.
What they lie in then is ready before they are (`toolkit/spare.py`).
"""

from __future__ import annotations

import contextlib
import logging

import torch
from comfy.cli_args import args

from ..toolkit.spare import Spare

MOST = 256 << 20  # bytes of pinned memory that one tensor may take
log = logging.getLogger("ark")
_spare = Spare()


def deliver(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Bring a result to where the host wants it: from a GPU through pinned memory.

    Args:
        tensor: of the result.
        device: where to.
    """
    if tensor.device.type != "cuda" or device.type != "cpu":
        return tensor.to(device)
    if (there := pinned(tensor)) is None:
        return tensor.to(device)
    shape = tuple(tensor.shape)
    result = _spare.take(shape, tensor.dtype).copy_(there.copy_(tensor))
    _spare.prepare(shape, tensor.dtype)
    return result


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Bring an input to the GPU: through pinned memory, as all processor cores copy there.

    Args:
        tensor: of the input; rows and columns may lie apart.
        device: where to.

    Returns:
        The same, contiguous.
    """
    if tensor.device.type == "cpu" and device.type == "cuda":
        if not (tensor.is_contiguous() and tensor.is_pinned()) and (there := pinned(tensor)) is not None:  # fmt: skip
            tensor = there.copy_(tensor)
        return tensor.to(device, non_blocking=True).contiguous()
    return tensor.to(device).contiguous()


def current(device: torch.device) -> contextlib.AbstractContextManager:
    """Make it torch's current one, on which Triton launches."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def pinned(like: torch.Tensor) -> torch.Tensor | None:
    """Pinned memory for a tensor, None if there is none to be had."""
    if args.disable_pinned_memory or like.nbytes > MOST:
        return None
    try:
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)
    except RuntimeError:  # there is no more such memory
        log.debug("Ark: %d bytes go through memory that is not pinned.", like.nbytes)
        return None
