"""The host's text encoder in Ark's engine, in place of the host's layers, which run in fp32; see `toolkit/text_engine.py`."""

from __future__ import annotations

from typing import Any

import comfy.model_management
from comfy.cli_args import args

from ..toolkit import text_engine
from ..toolkit.fused.runner import Unknown


class TextEngine(text_engine.TextEngine):
    """Runs the layers of one text encoder where they lie.

    Args:
        masters: of the encoder's patcher, which say when a weight has moved or changed; None if none ever will.
    """

    def __init__(self, masters: Any = None):
        super().__init__("ComfyUI's")
        if masters is not None:
            masters.watchers.add(self)

    def check(self, model: Any) -> None:
        """Raise Unknown for what may change between two calls, and if the user wants fp32."""
        super().check(model)
        if args.fp32_text_enc:
            raise Unknown("--fp32-text-enc")

    def free_memory(self) -> None:
        """Give what nobody uses back to the device."""
        comfy.model_management.soft_empty_cache()
