"""ArkDoctor: what this machine has, what of it is broken, and what Ark would do on it."""

from __future__ import annotations

from pathlib import Path

import comfy.model_management
import comfyui_version
import folder_paths
from comfy_api.latest import io

from ..toolkit.doctor import examine
from ..toolkit.finding import Subject
from . import live
from .schema import schema

FOLDERS = ("diffusion_models", "checkpoints", "text_encoders")


class ArkDoctor(io.ComfyNode):
    """Looks at the machine as ComfyUI uses it; changes nothing."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return schema(
            "ArkDoctor",
            "Ark Doctor",
            search_aliases=["diagnose", "system info", "triton check", "why is it slow"],
            description="Says what of this machine Ark can use, what is broken, and what to set, each with its reason.",
            is_output_node=True,
            inputs=[
                io.Boolean.Input(
                    "measure",
                    default=True,
                    tooltip="Read up to half a gigabyte of a model's file, and time the attention kernels if that was not "
                    "done on this card yet. Off: say only what is known.",
                ),
            ],
            outputs=[
                io.String.Output("report", display_name="report", tooltip="The report as text."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, measure: bool = True) -> float:
        """Look anew each time: the machine may have changed."""
        return float("nan")

    @classmethod
    def execute(cls, measure: bool) -> io.NodeOutput:
        """Look."""
        known = [Path(place) for name in FOLDERS for place in folder_paths.get_folder_paths(name)]
        folders = tuple(dict.fromkeys(place for place in known if place.is_dir()))
        device = comfy.model_management.get_torch_device()
        report = examine(Subject(folders, comfyui_version.__version__, device, measure))
        live.show(live.place(cls), {"lines": report.lines})
        return io.NodeOutput(str(report), ui={"text": [str(report)]})
