"""A model's weights on their way to where it runs, in few large pieces, while its modules are still to be built."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import torch

from .ahead import Sending, send, wait_for
from .errors import TransferFailed
from .header import TensorEntry
from .igniter import OpenedModel
from .transfer import TransferReport

log = logging.getLogger("ark")


class Shipment:
    """Some tensors of a model, sent at once.

    To another device than an NVIDIA GPU torch copies them when they are waited for; for a CPU they stay views of the mapped file.

    Args:
        opened: the model; kept until everything has arrived.
        tensors: the ones to send, by any names.
        device: where to.

    Attributes:
        nbytes: of all tensors.
        reports: of the transfers, once everything has arrived.
    """

    fast_devices = ("cuda",)

    def __init__(
        self, opened: OpenedModel, tensors: Mapping[str, torch.Tensor], device: torch.device
    ):
        self.nbytes = sum(tensor.nbytes for tensor in tensors.values())
        self.reports: list[TransferReport] = []
        self._opened, self._device, self._tensors = opened, device, dict(tensors)
        self._places: dict[str, tuple[tuple, int]] = {}  # file and first byte, by name
        groups: dict[tuple, dict[int, TensorEntry]] = {}
        if device.type in self.fast_devices:
            for name, tensor in tensors.items():
                if origin := opened.origin_of(tensor):
                    file, entry = origin
                    groups.setdefault(file.identity, {})[entry.start] = entry
                    self._places[name] = file.identity, entry.start
        files = {file.identity: file for file, _ in opened.parts}
        self._sendings: dict[tuple, Sending] = {
            identity: send(opened, files[identity], entries, device)
            for identity, entries in groups.items()
        }

    @property
    def moved(self) -> int:
        """Bytes that have left so far."""
        return sum(sending.moved for sending in self._sendings.values())

    def cancel(self) -> None:
        """Let what has not left yet stay where it is; harmless when all has arrived."""
        for sending in self._sendings.values():
            sending.arrived.cancel()

    def arrive(self, watch: Callable[[int], None] = lambda moved: None) -> dict[str, torch.Tensor]:
        """Wait for the tensors; what no fast path could bring is copied by torch.

        Args:
            watch: called several times a second with the bytes that have left; what it raises ends the waiting.

        Returns:
            The tensors on the device, by the names given.

        Raises:
            ModelFileError: a file was changed on the way.
        """
        wait_for(self._sendings.values(), watch)
        arrived: dict[tuple, dict[int, torch.Tensor]] = {}
        for identity, sending in self._sendings.items():
            try:
                arrived[identity] = sending.arrived.result()
            except TransferFailed as error:
                log.warning("Ark igniter: torch copies the weights itself (%s).", error)
        self.reports = list(self._opened.reports.values())

        def of(name: str, tensor: torch.Tensor) -> torch.Tensor:
            identity, start = self._places.get(name, (None, 0))
            return arrived[identity][start] if identity in arrived else tensor.to(self._device)

        found = {name: of(name, tensor) for name, tensor in self._tensors.items()}
        self._tensors, self._sendings = {}, {}
        return found
