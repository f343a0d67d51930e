"""ArkTextEncode: a prompt to conditioning."""

from __future__ import annotations

import time

from comfy_api.latest import io

from ..toolkit.errors import InputError
from . import live
from .schema import schema

FROM = {
    "memory": "Known, from memory",
    "disk": "Known, from disk: the text encoder was not loaded",
    "encoder": "Encoded",
}


class ArkTextEncode(io.ComfyNode):
    """Encodes a prompt, and says whether it was known."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return schema(
            "ArkTextEncode",
            "Ark Text Encode",
            search_aliases=["prompt klein", "clip text encode", "conditioning", "qwen3 text"],
            description="A prompt to conditioning. What ArkFastLoader's CLIP has encoded before, it need not encode again, "
            "not even after a restart.",
            inputs=[
                io.Clip.Input("clip", tooltip="Klein's text encoder, from Ark Fast Loader."),
                io.String.Input(
                    "text",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="The prompt, in plain words. Klein knows no weights: (word:1.3) is read as it stands.",
                ),
            ],
            outputs=[io.Conditioning.Output(tooltip="For the sampler's positive input.")],
        )

    @classmethod
    def execute(cls, clip, text: str) -> io.NodeOutput:
        """Encode."""
        if clip is None:
            raise InputError("clip: there is no text encoder.", "Connect the CLIP of Ark Fast Loader; a checkpoint may have none.")  # fmt: skip
        start = time.perf_counter()
        conditioning = clip.encode_from_tokens_scheduled(clip.tokenize(text))
        ms = 1e3 * (time.perf_counter() - start)
        source = getattr(clip, "source", None) or "encoder"  # a CLIP of another loader does not say
        where = live.place(cls)
        live.show(where, {"source": source, "ms": ms})
        live.add_to_run(where, encode_ms=ms)
        return io.NodeOutput(conditioning, ui={"text": [f"{FROM[source]} ({ms:.1f} ms)."]})
