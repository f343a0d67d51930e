"""ArkReport: what was set on a model, in words and in a small chart."""

from __future__ import annotations

import textwrap

import numpy
import torch
from comfy_api.latest import io
from PIL import Image, ImageDraw, ImageFont

from ..patches.prewarm import parse_sizes
from ..patches.report import Report, report_on
from ..toolkit.errors import InputError
from . import live
from .schema import schema

WIDTH, LINE = 768, 26  # px


class ArkReport(io.ComfyNode):
    """Measures a model as it is set up, and compares it with itself without Ark if asked."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return schema(
            "ArkReport",
            "Ark Report",
            search_aliases=["benchmark", "ms a step", "compare with native", "speed report"],
            description="Says which kernel and compilation a model has, times its steps, and shows how the weights were loaded.",
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="A FLUX.2-Klein MODEL, with whatever was set on it."),
                io.String.Input("size", default="1024x1024", tooltip="Size in px to time the steps at."),
                io.Boolean.Input(
                    "compare",
                    default=False,
                    tooltip="Also run the model without what Ark set on it, and say how far the results are apart.",
                ),
            ],
            outputs=[
                io.String.Output("report", display_name="report", tooltip="The report as text."),
                io.Image.Output("chart", display_name="chart", tooltip="The report as a picture."),
            ],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, size: str | None = None) -> bool | str:
        """Say before anything runs that the size cannot be read."""
        try:
            parse_sizes("16x16" if size is None else size)
        except InputError as error:
            return f"size: {error}"
        return True

    @classmethod
    def execute(cls, model, size: str, compare: bool) -> io.NodeOutput:
        """Run and draw."""
        report = report_on(model, parse_sizes(size)[0], compare)
        text = "\n".join(report.lines)
        live.show(live.place(cls), {"lines": report.lines})
        return io.NodeOutput(text, draw(report), ui={"text": [text]})


def draw(report: Report) -> torch.Tensor:
    """The report as a picture: a bar for each time of a step, then its lines.

    Returns:
        [1, H, W, 3] fp32 from 0 to 1.
    """
    lines = [piece for line in report.lines for piece in textwrap.wrap(line, 96)]
    rows = len(report.step_ms) + len(lines) + 1
    picture = Image.new("RGB", (WIDTH, LINE * (rows + 1)), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(15)
    longest = max(report.step_ms.values())
    for row, (name, ms) in enumerate(report.step_ms.items()):
        y, color = LINE * row + LINE // 2, (215, 80, 30) if row == 0 else (90, 120, 170)
        end = 150 + (WIDTH - 300) * ms / longest
        pen.text((12, y), name, "black", font)
        pen.rectangle((150, y + 2, end, y + LINE - 6), fill=color)
        pen.text((end + 6, y), f"{ms:.2f} ms a step", "black", font)
    for row, line in enumerate(lines, start=len(report.step_ms) + 1):
        pen.text((12, LINE * row + LINE // 2), line, "black", font)
    return torch.from_numpy(numpy.asarray(picture).astype(numpy.float32) / 255)[None]
