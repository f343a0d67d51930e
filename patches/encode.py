"""A prompt to Klein's conditioning, as a pipeline makes it; the last ones are remembered."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch

from .text_diffusers import METHOD

KEPT = 16  # conditionings of the last prompts, 8 MB each


class PromptEncoder:
    """Encodes prompts for one pipeline, and remembers the last ones.

    Args:
        pipeline: a `Flux2KleinPipeline`.
    """

    def __init__(self, pipeline: Any):
        self._pipeline = pipeline
        self._known: OrderedDict[tuple, torch.Tensor] = OrderedDict()

    def __call__(self, prompt: str) -> torch.Tensor:
        """The conditioning, [1, 512, 3 * hidden] in the text encoder's dtype and on its device."""
        pipeline = self._pipeline
        key = prompt, vars(pipeline).get(METHOD)  # whose result it is: Ark's or the library's
        if key not in self._known:
            # not `encode_prompt`, which waits for it, as it brings positions to the device
            self._known[key] = getattr(pipeline, METHOD)(
                text_encoder=pipeline.text_encoder, tokenizer=pipeline.tokenizer, prompt=prompt,
                max_sequence_length=pipeline.tokenizer_max_length,
            )  # fmt: skip
        self._known.move_to_end(key)
        while len(self._known) > KEPT:
            self._known.popitem(last=False)
        return self._known[key]
