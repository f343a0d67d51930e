"""ArkPrewarm: the wait for a compiler, before anybody waits for an image."""

from __future__ import annotations

import time

import comfy.utils
from comfy_api.latest import io

from ..patches.prewarm import parse_sizes, prewarm
from ..toolkit.errors import InputError
from . import live
from .schema import schema


class ArkPrewarm(io.ComfyNode):
    """Runs a model once at some sizes and passes it on."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return schema(
            "ArkPrewarm",
            "Ark Prewarm",
            search_aliases=["warm up", "precompile", "first image"],
            description="Runs one step at each size, so that compiling and first kernels are over before the first image. "
            "Put it between Ark Sage Combustion and the sampler.",
            inputs=[
                io.Model.Input("model", tooltip="A FLUX.2-Klein MODEL; it is passed on."),
                io.String.Input(
                    "sizes",
                    default="1024x1024",
                    tooltip="Sizes in px that you will make, like 1024x1024, 832x1216. Whole 16s.",
                ),
                io.Int.Input("batch_size", default=1, min=1, max=64, tooltip="Pictures at once."),
            ],
            outputs=[io.Model.Output(tooltip="The same model.")],
        )

    @classmethod
    def validate_inputs(cls, sizes: str | None = None) -> bool | str:
        """Say before anything runs which size cannot be read; of a linked input nothing is known yet."""
        try:
            parse_sizes("16x16" if sizes is None else sizes)
        except InputError as error:
            return f"sizes: {error}"
        return True

    @classmethod
    def execute(cls, model, sizes: str, batch_size: int) -> io.NodeOutput:
        """Run."""
        wanted, start = parse_sizes(sizes), time.perf_counter()
        progress = comfy.utils.ProgressBar(len(wanted))
        prewarm(model, wanted, batch_size, lambda: progress.update(1))
        seconds = time.perf_counter() - start
        live.show(live.place(cls), {"sizes": len(wanted), "seconds": seconds})
        report = f"Warm for {len(wanted)} sizes after {seconds:.1f} s."
        return io.NodeOutput(model, ui={"text": [report]})
