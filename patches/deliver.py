"""Tensors between a GPU and the host's memory, at the speed of the link, which takes pinned memory.

It is borrowed: the host keeps results for as long as it likes, and to pin memory anew for each takes longer than to copy.
What they lie in then is ready before they are (`toolkit/spare.py`). What was brought either way is known on both sides for
a while, so that the next node need not bring it again.
"""

from __future__ import annotations

import contextlib
import logging
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from comfy.cli_args import args

from ..toolkit.spare import Spare
from ..toolkit.twins import Twins

MOST = 256 << 20  # bytes of pinned memory that one tensor may take
log = logging.getLogger("ark")
_spare = Spare()
_twins = Twins()
_carrier = ThreadPoolExecutor(1, "ark-deliver")


class Delivery:
    """A result on its way to where the host wants it: from a GPU through pinned memory.

    Args:
        tensor: of the result; nobody writes to it any more.
        device: where to.
    """

    def __init__(self, tensor: torch.Tensor, device: torch.device):
        self._tensor, self._there = tensor, None
        self._coming: Future[torch.Tensor] | None = None
        if tensor.device.type == "cuda" and device.type == "cpu":
            self._there = pinned(tensor)
        if self._there is None:
            self._tensor = tensor.to(device)
            return
        self._there.copy_(tensor, non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record(torch.cuda.current_stream(tensor.device))

    def bring(self) -> Delivery:
        """Have it brought by another thread, while whoever is going to ask for it has other things to do; returns itself."""
        if self._there is not None:
            # not itself: whoever lets go of it last frees memory of the device
            self._coming = _carrier.submit(_brought, self._there, self._copied, self._tensor.device)
        return self

    def arrived(self, wanted_there: bool = False) -> torch.Tensor:
        """The result, once; waits for it.

        Args:
            wanted_there: whether it is likely to be uploaded again.
        """
        if self._there is None:
            return self._tensor
        if self._coming is not None:
            result = self._coming.result()
        else:
            result = _brought(self._there, self._copied, self._tensor.device)
        if wanted_there:
            _twins.remember(result, self._tensor.contiguous())
        return result


def _brought(there: torch.Tensor, copied: torch.cuda.Event, device: torch.device) -> torch.Tensor:
    """Out of memory that is borrowed, once it is there."""
    with current(device):
        copied.synchronize()
    shape = tuple(there.shape)
    result = _spare.take(shape, there.dtype)
    with torch.inference_mode():  # a mode is a thread's own
        result.copy_(there)
    _spare.prepare(shape, there.dtype)
    return result


def deliver(tensor: torch.Tensor, device: torch.device, wanted_there: bool = False) -> torch.Tensor:
    """Bring a result to where the host wants it, see `Delivery`."""
    return Delivery(tensor, device).arrived(wanted_there)


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Bring an input to the GPU: through pinned memory, as all processor cores copy there.

    Args:
        tensor: of the input; rows and columns may lie apart.
        device: where to.

    Returns:
        The same, contiguous; only to be read.
    """
    if tensor.device.type != "cpu" or device.type != "cuda":
        return tensor.to(device).contiguous()
    if (found := _twins.find(tensor, device)) is not None:
        return found
    source = tensor
    if not (tensor.is_contiguous() and tensor.is_pinned()) and (there := pinned(tensor)) is not None:  # fmt: skip
        source = there.copy_(tensor)
    found = source.to(device, non_blocking=True).contiguous()
    _twins.remember(tensor, found)
    return found


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
