"""PNG files that say how they were made, to people, to ComfyUI and to programs."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .jobs import Job

SETTINGS = "ark"  # the text chunk with everything as JSON
GRAPH = "prompt"  # the one that ComfyUI opens as a graph when the file is dropped on its canvas
PARAMETERS = "parameters"  # the one that galleries show


def encode_png(image: Any, texts: Mapping[str, str]) -> bytes:
    """A picture as PNG with text chunks.

    Args:
        image: PIL's.
        texts: by keyword; anything Unicode.
    """
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, text in texts.items():
        info.add_text(key, text)  # Unicode goes to an iTXt chunk by itself
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info, compress_level=1)
    return buffer.getvalue()


def read_settings(path: Path) -> dict[str, Any]:
    """What `describe_picture` wrote into a file as SETTINGS; nothing if it is not one of these."""
    from PIL import Image

    try:
        image: Any
        with Image.open(path) as image:
            found = json.loads(image.text[SETTINGS])
    except (OSError, ValueError, KeyError, AttributeError, SyntaxError):
        return {}
    return found if isinstance(found, dict) else {}


def describe_picture(
    job: Job, settings: Mapping[str, Any], names: Mapping[str, str]
) -> dict[str, str]:
    """The text chunks of a picture.

    Args:
        job: what was made.
        settings: how, anything that JSON takes.
        names: of the files: transformer, text_encoder, vae.
    """
    line = f"Steps: {job.steps}, Sampler: Euler, CFG scale: 1, Seed: {job.seed}, Size: {job.width}x{job.height}, "
    line += f"Model: {Path(names['transformer']).stem}"
    return {
        PARAMETERS: f"{job.prompt}\n{line}",
        GRAPH: json.dumps(comfyui_graph(job, names, settings)),
        SETTINGS: json.dumps({**asdict(job), **settings}),
    }


def comfyui_graph(
    job: Job, names: Mapping[str, str], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """The graph that makes the same picture in ComfyUI, in the form of its API.

    References go by their file's name: they have to lie in ComfyUI's input folder, and above a megapixel, where diffusers
    reduces them, the picture is another.

    Args:
        job: what is made.
        names: of the files as ComfyUI lists them: transformer, text_encoder, vae.
        settings: of the combustion: attention, engine, precision.
    """

    def node(class_type: str, **inputs: Any) -> dict[str, Any]:
        return {"class_type": class_type, "inputs": inputs}

    engine = settings.get("engine")
    compiled = "default" if engine == "compile" else "off"
    engine = "fused" if engine == "fused" else "host"
    graph = {
        "1": node("ArkFastLoader", diffusion_model=names["transformer"], text_encoder=names["text_encoder"], vae=names["vae"]),
        "2": node("ArkSageCombustion", model=["1", 0], attention=settings.get("attention", "auto"), compile=compiled, engine=engine, precision=settings.get("precision", "bf16")),
        "3": node("CLIPTextEncode", clip=["1", 1], text=job.prompt),
        "4": node("EmptyFlux2LatentImage", width=job.width, height=job.height, batch_size=1),
        "5": node("ArkSampler4Step", model=["2", 0], positive=["3", 0], latent_image=["4", 0], seed=job.seed, steps=job.steps, denoise=1.0),
        "6": node("VAEDecode", samples=["5", 0], vae=["1", 2]),
        "7": node("SaveImage", images=["6", 0], filename_prefix="ark"),
    }  # fmt: skip
    for number, image in enumerate(job.images):
        at = 10 + 10 * number
        graph[str(at)] = node("LoadImage", image=Path(image).name)
        graph[str(at + 1)] = node("VAEEncode", pixels=[str(at), 0], vae=["1", 2])
        inputs = graph["5"]["inputs"]
        graph[str(at + 2)] = node("ReferenceLatent", conditioning=inputs["positive"], latent=[str(at + 1), 0])  # fmt: skip
        inputs["positive"] = [str(at + 2), 0]
    return graph
