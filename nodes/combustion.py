"""ArkSageCombustion: an attention kernel for one MODEL, its blocks compiled, or its whole step in Ark's own kernels."""

from __future__ import annotations

import dataclasses

from comfy_api.latest import io

from ..patches.attention import set_attention
from ..patches.compile import CHOICES as COMPILE
from ..patches.compile import set_compile
from ..patches.fused import PRECISIONS, engine_of, remove_fused, set_fused
from ..patches.state import settings_of
from ..toolkit.errors import InputError
from ..toolkit.kernels import KERNELS
from . import live
from .schema import schema

ATTENTION = ["auto", *KERNELS, "none"]
ENGINES = ["auto", "host", "fused"]


class ArkSageCombustion(io.ComfyNode):
    """Sets attention kernel, compilation and engine on a clone; bypassing the node leaves the model as it was."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return schema(
            "ArkSageCombustion",
            "Ark Sage Combustion",
            search_aliases=[
                "sage attention",
                "torch compile",
                "attention kernel",
                "fp8 speed",
                "flash attention",
            ],
            description="Runs this model's attention on a faster kernel, and if you like its blocks compiled, or its whole "
            "step fused. Acts on a copy of the model's options only.",
            inputs=[
                io.Model.Input("model", tooltip="A FLUX.2-Klein MODEL; it is not changed."),
                io.Combo.Input(
                    "attention",
                    options=ATTENTION,
                    default="auto",
                    tooltip="auto: measures every kernel that runs on this card once and takes the fastest that passes a "
                    "check against fp32. sage...: SageAttention, slightly lossy, if installed. kitchen_int8: comfy-kitchen's, "
                    "slightly lossy. cudnn_fp8: cuDNN's in fp8, lossy, only by name, if nvidia-cudnn-frontend is installed. cudnn, flash, efficient, math: torch's. flash3, flash4: FlashAttention, if installed; flash4 only by name. "
                    "none: ComfyUI's own, also cancelling an earlier override.",
                ),
                io.Combo.Input(
                    "compile",
                    options=list(COMPILE),
                    default="off",
                    optional=True,
                    tooltip="torch.compile, block by block. The first image of a model then takes some seconds longer, later "
                    "ones are faster; LoRAs, seeds and new sizes compile nothing anew, and a restart finds what was "
                    "compiled. default: a good choice. reduce-overhead: CUDA graphs. max-autotune-no-cudagraphs: tries "
                    "more kernels, compiles longest. off: also cancels an earlier one.",
                ),
                io.Combo.Input(
                    "engine",
                    options=ENGINES,
                    default="auto",
                    optional=True,
                    tooltip="auto: fused where its kernels run, on NVIDIA GPUs with Triton, unless blocks are compiled; else host. "
                    "host: ComfyUI's own code runs the model. fused: Ark's step of few, large kernels, with nothing to "
                    "compile; what it does not know (ControlNet, patches of other nodes) still runs on ComfyUI's code.",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(PRECISIONS),
                    default="bf16",
                    optional=True,
                    tooltip="Of the fused engine's large matrices. bf16: as they are. fp8: faster, lossy; made on the card "
                    "from the weights, LoRAs included. An fp8 file runs in fp8 either way.",
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
    def validate_inputs(
        cls, attention: str, compile: str = "off", engine: str = "auto", precision: str = "bf16"
    ) -> bool | str:
        """Older hosts do not check V3 combos."""
        for name, value, known in (
            ("attention", attention, ATTENTION),
            ("compile", compile, COMPILE),
            ("engine", engine, ENGINES),
            ("precision", precision, PRECISIONS),
        ):
            if value not in known:
                return f"{name}: {value} is not one of {', '.join(known)}."
        return True

    @classmethod
    def execute(
        cls,
        model,
        attention: str,
        compile: str = "off",
        engine: str = "auto",
        precision: str = "bf16",
    ) -> io.NodeOutput:
        """Patch a clone."""
        asked = engine
        if engine == "auto":
            engine, why = engine_of(model, compile != "off", precision)
        if engine == "fused" and compile != "off":
            raise InputError("The fused engine has nothing to compile.", "Set compile to off, or engine to host.")  # fmt: skip
        if engine == "host" and precision != "bf16":
            raise InputError(f"{precision} is a precision of the fused engine.", "Set engine to fused, or precision to bf16.")  # fmt: skip
        patched, report = set_attention(model, attention)
        patched, more, _ = set_compile(patched, compile)
        report = f"{report}\n{more}" if compile != "off" else report
        patched, more = (
            set_fused(patched, precision) if engine == "fused" else (remove_fused(patched), "")
        )
        if asked == "auto" and engine == "host":
            more = f"engine: host, as {why}."
        report = f"{report}\n{more}" if more else report
        live.show(live.place(cls), {**dataclasses.asdict(settings_of(patched)), "why": report})
        return io.NodeOutput(patched, report, ui={"text": [report]})
