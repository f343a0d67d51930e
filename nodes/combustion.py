"""ArkSageCombustion: an attention kernel for one MODEL."""

from __future__ import annotations

from comfy_api.latest import io

from ..patches.attention import set_attention
from ..toolkit.combustion import KERNELS

CHOICES = ["auto", *KERNELS, "none"]


class ArkSageCombustion(io.ComfyNode):
    """Sets the attention kernel on a clone of the model; bypassing the node leaves the model as it was."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="ArkSageCombustion",
            display_name="Ark Sage Combustion",
            category="Ark",
            description="Runs this model's attention on a faster kernel. Acts on a copy of the model's options only.",
            inputs=[
                io.Model.Input("model", tooltip="A FLUX.2-Klein MODEL; it is not changed."),
                io.Combo.Input(
                    "attention",
                    options=CHOICES,
                    default="auto",
                    tooltip="auto: the best that runs on this card. sage: SageAttention, INT8, slightly lossy, if "
                    "installed. cudnn, flash, efficient, math: torch's kernels. none: ComfyUI's own, also "
                    "cancelling an earlier override.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The model with the kernel set."),
                io.String.Output(
                    "report", display_name="report", tooltip="Which kernel runs, and why."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, attention: str) -> bool | str:
        """Older hosts do not check V3 combos."""
        return attention in CHOICES or f"attention: {attention} is not one of {', '.join(CHOICES)}."

    @classmethod
    def execute(cls, model, attention: str) -> io.NodeOutput:
        """Patch a clone."""
        patched, report = set_attention(model, attention)
        return io.NodeOutput(patched, report, ui={"text": [report]})
