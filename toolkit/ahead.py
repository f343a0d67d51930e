"""Weights on their way to the device, often before anybody asks for them: while the host still builds their modules.

One queue for the whole process: models travel one after the other in the order in which they were opened, each with the
whole link to itself, so that the first one is complete while the next is still on its way.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from concurrent import futures
from dataclasses import dataclass, field

import torch

from .header import ModelFile, TensorEntry
from .igniter import OpenedModel
from .layout import Layout, plan_layout
from .paths import mmap_pin
from .shared import short_turns
from .transfer import transfer

ROOM = 2.0  # times the weights must be free on the device: nothing is sent ahead where the host may have to make room
SPARE = 4 << 30  # bytes besides, for activations
PATIENCE = 60.0  # s until what nobody took is given up
GLANCE = 0.1  # s between two looks at what is on its way
_queue = futures.ThreadPoolExecutor(1, "ark-ahead")


@dataclass(eq=False)
class Sending:
    """Tensors of one file on their way.

    Attributes:
        layout: which ones.
        moved: bytes that have left.
        arrived: the tensors on the device, by their first byte in the file.
    """

    layout: Layout[int]
    moved: int = 0
    arrived: futures.Future[dict[int, torch.Tensor]] = field(init=False)

    def advance(self, nbytes: int) -> None:
        """Count a piece that has left."""
        self.moved += nbytes


def send(
    opened: OpenedModel,
    file: ModelFile,
    entries: Mapping[int, TensorEntry],
    device: torch.device,
) -> Sending:
    """Put some tensors of a file into the queue.

    Args:
        opened: the model that they belong to; hears of the transfer (`OpenedModel.hear`).
        file: one of its files.
        entries: the tensors by their first byte.
        device: where to.
    """
    sending = Sending(plan_layout(entries))
    sending.arrived = _queue.submit(_send, sending, file, device, weakref.ref(opened))
    return sending


def _send(
    sending: Sending, file: ModelFile, device: torch.device, opened: weakref.ref[OpenedModel]
) -> dict[int, torch.Tensor]:
    with torch.inference_mode(False), short_turns:  # weights outlive the prompt
        flat, report = transfer(file, sending.layout, device, sending.advance)
        if report.path != "mmap_pin":
            mmap_pin.pin_at_leisure(file, sending.layout, device, opened)
        if model := opened():
            model.hear(report)
        return sending.layout.views(flat)


def send_ahead(
    opened: OpenedModel, tensors: Iterable[torch.Tensor], device: torch.device
) -> str | None:
    """Start sending some tensors of a model.

    Args:
        opened: the model; what is on its way waits in its `ahead`.
        tensors: the ones that will be needed; those that are no views of a mapped file are left out.
        device: where to.

    Returns:
        Why nothing was sent, or None.
    """
    groups: dict[tuple, dict[int, TensorEntry]] = {}
    files = {file.identity: file for file, _ in opened.parts}
    for tensor in tensors:
        origin = opened.origin_of(tensor)
        if origin and origin[0].identity in opened.mapped:
            groups.setdefault(origin[0].identity, {})[origin[1].start] = origin[1]
    needed = sum(entry.nbytes for entries in groups.values() for entry in entries.values())
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        if free < ROOM * needed + SPARE:
            return f"{needed / 1e9:.1f} GB would leave too little of the {free / 1e9:.1f} GB that are free"
    for identity, entries in groups.items():
        sending = send(opened, files[identity], entries, device)
        opened.ahead[identity, device] = sending
        give_up = functools.partial(_wait, opened.ahead, (identity, device))
        sending.arrived.add_done_callback(give_up)
    return None


def _wait(ahead: dict, key: tuple, _: object) -> None:
    """Give up what has arrived and nobody has taken for long."""
    timer = threading.Timer(PATIENCE, ahead.pop, (key, None))
    timer.daemon = True
    timer.start()


def take_ahead(opened: OpenedModel, device: torch.device) -> dict[tuple, Sending]:
    """What was sent ahead to a device, once, by file identity; it may still be on its way."""
    return {
        key[0]: sending
        for key in [key for key in opened.ahead if key[1] == device]
        if (sending := opened.ahead.pop(key, None))
    }


def wait_for(
    sendings: Iterable[Sending], watch: Callable[[int], None] = lambda moved: None
) -> None:
    """Wait until everything has arrived or failed; `Sending.arrived` has the result.

    Args:
        sendings: what to wait for.
        watch: called several times a second with the bytes that have left so far; what it raises ends the waiting.
    """
    sendings = list(sendings)
    pending: set[futures.Future] = {sending.arrived for sending in sendings}
    while pending:
        _, pending = futures.wait(pending, GLANCE)
        watch(sum(sending.moved for sending in sendings))


def settle() -> None:
    """Wait until nothing is on its way any more: what is measured on a device meanwhile says nothing."""
    _queue.submit(int).result()
