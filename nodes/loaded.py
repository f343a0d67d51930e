"""What became of a model that was opened: the bytes travel while the graph goes on, and leave the card again."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from ..toolkit.paths import mmap_pin
from ..toolkit.transfer import TransferReport


class Loaded:
    """Follows the parts of a model, and keeps none of them alive.

    Args:
        parts: the host's patchers by the name of what they hold.
        size: of the files, in bytes.
        seconds: that opening them took.
    """

    def __init__(self, parts: dict[str, Any], size: int, seconds: float):
        self._opened = {"bytes": size, "seconds": seconds}
        self._parts = {name: (weakref.ref(patcher.model), patcher.model_size()) for name, patcher in parts.items()}  # fmt: skip
        self._listeners = [patcher.masters.opened.listeners for patcher in parts.values()]
        self._transfers: dict[str, TransferReport] = {}
        for patcher in parts.values():
            patcher.masters.opened.listeners.append(self._add)
            self._transfers |= patcher.masters.opened.reports  # those that were faster than this

    def _add(self, report: TransferReport) -> None:
        self._transfers[report.file] = report

    def listen(self, changed: Callable[[], None]) -> None:
        """Have a function called after each further transfer, from any thread."""
        for listeners in self._listeners:
            listeners.append(lambda _report: changed())

    def lines(self) -> list[str]:
        """The transfers so far, and what is pinned."""
        found = [f"{report}." for report in list(self._transfers.values())]
        limit = mmap_pin.pin_limit()
        if found and limit:
            found.append(f"Pinned {mmap_pin.pinned() / 1e9:.1f} of at most {limit / 1e9:.0f} GB (ARK_PIN_LIMIT_GB).")  # fmt: skip
        return found

    def facts(self) -> dict[str, Any]:
        """As things are now.

        Returns:
            opened (bytes, seconds), transfers (see `TransferReport.facts`), pinned (bytes, limit), and resident: how many
            bytes of each part lie where it is computed with.
        """
        return {
            "opened": self._opened,
            "transfers": [report.facts() for report in list(self._transfers.values())],
            "pinned": {"bytes": mmap_pin.pinned(), "limit": mmap_pin.pin_limit()},
            "resident": [
                _resident(name, model(), size) for name, (model, size) in self._parts.items()
            ],  # fmt: skip
        }


def _resident(part: str, model: Any, size: int) -> dict[str, Any]:
    loaded = min(getattr(model, "model_loaded_weight_memory", 0), size)  # none of one that is gone
    device = getattr(getattr(model, "device", None), "type", None)
    return {"part": part, "bytes": loaded, "of": size, "device": device if loaded else None}
