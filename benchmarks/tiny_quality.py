"""Does the embedded model draw what the prompt says? `python benchmarks/tiny_quality.py [--captions 200]`.

Held-out captions (scenes that no training run ever saw, in any phrasing) are rendered in four steps by a real ComfyUI
server through Ark's nodes, and judged by `classifier.py`, which looks at pixels only. Prints the share right a
category, writes `results/tiny_quality.json` and a contact sheet.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from ark import bootstrap
from ark.assets import scenes
from ark.benchmarks.classifier import CATEGORIES, judge
from ark.benchmarks.record import RESULTS, row, write_record


def contact_sheet(pictures: list[np.ndarray], captions: list[str], columns: int = 6) -> Image.Image:
    """Pictures with their captions beneath."""
    side, text = 170, 44
    rows = (len(pictures) + columns - 1) // columns
    sheet = Image.new("RGB", (columns * (side + 10) + 10, rows * (side + text + 8) + 10), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        x, y = 10 + index % columns * (side + 10), 10 + index // columns * (side + text + 8)
        sheet.paste(Image.fromarray(picture).resize((side, side), Image.LANCZOS), (x, y))
        draw.rectangle((x, y, x + side - 1, y + side - 1), outline=(200, 200, 200))
        words, lines = caption.split(), [""]
        for word in words:
            if len(lines[-1]) + len(word) > 27:
                lines.append("")
            lines[-1] += word + " "
        draw.multiline_text((x, y + side + 3), "\n".join(lines), fill="black", spacing=1)
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--captions", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--comfyui", help="a ComfyUI folder; else the one bootstrap finds")
    args = parser.parse_args()
    asked = scenes.sample_scenes(args.captions, args.seed, held_out=True)
    found = bootstrap.find_comfyui(args.comfyui)
    environment = bootstrap.Environment(Path(sys.prefix))
    host_folder = found or environment.registry_host()

    verdicts, pictures = [], []
    with bootstrap.Host.start(host_folder) as host:
        client = bootstrap.Client(host.url)
        graph = bootstrap.to_api(
            json.loads(Path(bootstrap.WORKFLOW).read_text()), client.object_info()
        )
        for index, (scene, caption) in enumerate(asked):
            prompt = copy.deepcopy(graph)
            for node in prompt.values():
                if node["class_type"] == "CLIPTextEncode":
                    node["inputs"]["text"] = caption
                if node["class_type"] == "ArkSampler4Step":
                    node["inputs"]["seed"] = args.seed * 1000 + index
            (png,) = client.run(prompt, timeout=300)["images"]
            pictures.append(np.asarray(Image.open(io.BytesIO(png)).convert("RGB")))
            verdicts.append(judge(pictures[-1], scene))
            wrong = [name for name, right in verdicts[-1].items() if not right]
            if wrong:
                print(f"{index}: {caption}: wrong {', '.join(wrong)}", flush=True)
        stats = client.get("/system_stats")

    rows = []
    for category in CATEGORIES:
        judged = [verdict[category] for verdict in verdicts if category in verdict]
        rows.append(row(category, sum(judged) / len(judged), "share", len(judged)))
    whole = [all(verdict.values()) for verdict in verdicts]
    rows.append(
        row("all", sum(whole) / len(whole), "share", len(whole), note="every category right")
    )
    for item in rows:
        print(f"{item['case']:12} {item['ark']:7.1%}  of {item['n']}")
    versions = {
        "python": platform.python_version(),
        "torch": version("torch"),
        "comfyui": stats["system"]["comfyui_version"],
    }
    write_record("tiny_quality", stats["devices"][0]["name"], versions, rows)
    sheet = RESULTS / "tiny_quality.png"
    contact_sheet(pictures[:24], [caption for _, caption in asked[:24]]).save(sheet, optimize=True)
    print(f"contact sheet: {sheet}")


if __name__ == "__main__":
    main()
