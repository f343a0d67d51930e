"""Bytes on their way, shown where the user looks: on the node that waits for them, and on the console if it takes long."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.utils
from tqdm import tqdm

SOON = 0.5  # s; what takes no longer is not shown on the console


class Progress:
    """A bar in the canvas and one on the console. Use as a context manager.

    Args:
        what: travels, for the console.
    """

    def __init__(self, what: str):
        self.what = what
        self.canvas: Any = None
        self.console: Any = None

    def watch(self, moved: int, total: int) -> None:
        """Show how far it is.

        Args:
            moved: bytes so far.
            total: bytes in all.

        Raises:
            The host's interrupt, if the user asked for it.
        """
        comfy.model_management.throw_exception_if_processing_interrupted()
        if self.canvas is None:
            self.canvas = comfy.utils.ProgressBar(total)
            self.console = tqdm(
                desc=self.what, total=total, unit="B", unit_scale=True, delay=SOON, leave=False
            )
        self.canvas.update_absolute(moved)
        self.console.update(moved - self.console.n)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.console is not None:
            self.console.close()
