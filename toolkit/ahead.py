"""Weights on their way to the device before anybody asks for them, while the host still builds the modules they belong to.

One queue for the whole process: models travel one after the other in the order in which they were opened, each with the
whole link to itself, so that the first one is complete while the next is still on its way.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from .errors import TransferFailed
from .igniter import OpenedModel
from .layout import plan_layout
from .transfer import transfer

ROOM = 2.0  # times the weights must be free on the device: nothing is sent ahead where the host may have to make room
SPARE = 4 << 30  # bytes besides, for activations
PATIENCE = 60.0  # s until what nobody took is given up
_queue = ThreadPoolExecutor(1, "ark-ahead")
log = logging.getLogger("ark")


def send_ahead(
    opened: OpenedModel, tensors: Iterable[torch.Tensor], device: torch.device
) -> str | None:
    """Start sending some tensors of a model.

    Args:
        opened: the model; what arrives waits in its `ahead`.
        tensors: the ones that will be needed; those that are no views of a mapped file are left out.
        device: where to.

    Returns:
        Why nothing was sent, or None.
    """
    groups: dict[tuple, dict] = {}
    files = {file.identity: file for file, _ in opened.parts}
    for tensor in tensors:
        origin = opened.origin_of(tensor)
        if origin and origin[0].identity in opened.mapped:
            groups.setdefault(origin[0].identity, {})[origin[1].start] = origin[1]
    layouts = {identity: plan_layout(entries) for identity, entries in groups.items()}
    needed = sum(layout.nbytes for layout in layouts.values())
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        if free < ROOM * needed + SPARE:
            return f"{needed / 1e9:.1f} GB would leave too little of the {free / 1e9:.1f} GB that are free"
    for identity, layout in layouts.items():
        opened.ahead[identity, device] = _queue.submit(_send, files[identity], layout, device)
    timer = threading.Timer(PATIENCE, opened.ahead.clear)
    timer.daemon = True
    timer.start()
    return None


def _send(file, layout, device) -> dict[int, torch.Tensor]:
    """One file's tensors on the device, by their first byte in the file."""
    flat, _ = transfer(file, layout, device)
    return layout.views(flat)


def take_ahead(opened: OpenedModel, device: torch.device) -> dict[tuple, dict[int, torch.Tensor]]:
    """What was sent ahead to a device, once: by file identity, then by first byte; waits for what is on its way.

    Raises:
        ModelFileError: a file has changed since it was opened.
    """
    taken: dict[tuple, dict[int, torch.Tensor]] = {}
    for identity, where in [key for key in opened.ahead if key[1] == device]:
        future: Future | None = opened.ahead.pop((identity, where), None)
        try:
            taken[identity] = future.result() if future else {}
        except (TransferFailed, RuntimeError) as error:
            log.warning("Ark igniter: nothing was sent ahead (%s).", error)
    return taken
